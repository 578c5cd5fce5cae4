"""FiRST's table as data: its arms, their seeds and settings, and the command line of each run."""

import collections
import dataclasses
import functools
import hashlib
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

CONFIG = "experiments/first/smollm2.py"
ROOT = pathlib.Path("runs/first")
TASKS = ("docstrings", "gsm_symbolic")
METRICS = {"docstrings": ("rouge_l", "chrf"), "gsm_symbolic": ("exact", "rouge_l")}
"""ROUGE-L of a worked solution against the reference's is a graded score beside the exact answer,
of which a model of 135M gets few or none."""
SKIPS = (0.2, 0.4)
SEEDS = (1, 2, 3)
TUNING_SEED = 100
TUNING_SKIP = 0.2
COMPARED = ("first", "unified", "random")
"""Three seeds with adapters: what the claim is about. `unified` is the official rule, which at
these rates keeps the front and the last layer."""
PEERS = ("none", "evenly", "influence", "cost", "layerskip")
"""One seed. `evenly` is what Unified's paper says in words; `influence` is where FiRST's routers
begin on docstrings, `cost` where they begin on word problems."""
NEVER_PLAIN = ("layerskip",)
"""Without its training it is the front of the model, as `unified` is."""
TUNED_ON = {"docstrings": "docstrings", "gsm_symbolic": "docstrings"}
"""Whose tuning runs choose a task's settings: those of docstrings for both, of every method alike.
Tuning the word problems too would have cost as much as their runs."""
RATES = (2e-3, 4e-3, 8e-3)
TUNING: dict[str, list[dict[str, object]]] = {
    method: [{"optim.learning_rate": rate} for rate in RATES] for method in (*COMPARED, *PEERS)
}
"""The same three rates of the adapters for every method, and nothing else: the fewest with which a
best that lies inside can be told from one at the edge (1e-3 stood in place of 8e-3 at first, and
was the worst for every method). What only FiRST has (the form of its gates,
the weight of its rate, its routers' rate and start) was chosen before by hand, by held-out loss
without adapters on the tuning seed and on seed 1 (docs/log.md): it was searched more than its
peers, whose sets have nothing to search."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A line of the table: how layers are chosen, how many are skipped, whether adapters learn."""

    method: str
    skip: float
    lora: bool = True

    @property
    def label(self) -> str:
        """Its name in tables and folders."""
        rate = f"-skip{round(100 * self.skip)}" if self.skip else ""
        return f"{self.method}{rate}{'' if self.lora else '-plain'}"

    @property
    def seeds(self) -> tuple[int, ...]:
        """Three where the claim is about it, else one."""
        return SEEDS if self.method in COMPARED and self.lora else SEEDS[:1]

    @property
    def learns(self) -> bool:
        """Whether anything of it is trained: adapters, or FiRST's routers."""
        return self.lora or self.method == "first"


ARMS = tuple(
    Arm(method, skip, lora)
    for lora in (True, False)
    for skip in (*SKIPS, 0.0)
    for method in (*COMPARED, *PEERS)
    if (method == "none") == (skip == 0.0) and (lora or method not in NEVER_PLAIN)
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: its task, arm and seed, the fields that differ, and its folder's name."""

    task: str
    arm: Arm
    seed: int
    changes: tuple[tuple[str, object], ...] = ()
    tuning: bool = False

    @property
    def name(self) -> str:
        """The folder, which holds the setting: a run with another one is another run."""
        setting = "-".join(
            f"{'r' if field.startswith('router') else ''}{field.split('.')[-1][:2]}{value:g}"
            for field, value in self.changes
        )
        kind = "tune-" if self.tuning else ""
        return f"{kind}{self.task}-{self.arm.label}-{setting or 'given'}-seed{self.seed}"

    @property
    def folder(self) -> pathlib.Path:
        """Where it runs."""
        return ROOT / self.name

    @property
    def setting(self) -> dict[str, object]:
        """The fields that differ, as records hold them."""
        return dict(self.changes)

    def config(self) -> list[str]:
        """The config and its overrides, as flags; held-out text is read at the end.

        Samples are left out, as they compile generation anew in every run.
        """
        given = f"{self.task},{self.arm.method},skip={self.arm.skip:g},seed={self.seed}"
        changes = {
            "run.dir": self.folder,
            "run.title": self.name,
            "run.samples": 0,
            "data.source.part": "train",
            "train.eval_every": 0,
            "train.eval_at_start": False,
            **dict(self.changes),
            **self.length(),
        }
        flags = [f"--config.{field}={value}" for field, value in changes.items()]
        return [f"--config={CONFIG}:{given}", *flags]

    def length(self) -> dict[str, object]:
        """Half the updates to tune; without adapters those of the routers alone, or one of none."""
        if self.arm.lora and not self.tuning:
            return {}
        steps, stage = given_length(self.task, self.arm)
        is_first = self.arm.method == "first"
        if not self.arm.lora:
            return {"lora": None, "train.steps": stage if is_first else 1}
        halves: dict[str, object] = {"train.steps": steps // 2}
        return halves | ({"router_steps": stage // 2} if is_first else {})

    def command(self) -> list[str]:
        """The command line of the run."""
        return [sys.executable, "-m", "jaxreason.main", *self.config()]


@functools.cache
def _config(task: str, arm: Arm):
    """What the config file gives an arm, with the first seed."""
    from jaxreason import config as config_lib
    from jaxreason.recipes import recipes

    known = {f"{cls.__module__}.{cls.__name__}": cls for cls in recipes()}
    arg = f"--config={CONFIG}:{task},{arm.method},skip={arm.skip:g},seed={SEEDS[0]}"
    return config_lib.parse([arg], recipes=known).config


def given_length(task: str, arm: Arm) -> tuple[int, int]:
    """The updates that the config file gives an arm: all, and those of the routers."""
    cfg = _config(task, arm)
    return cfg.train.steps, cfg.router_steps


def given_hash(task: str, arm: Arm) -> str:
    """Hash of all that the config file says of an arm's numbers: a record holds it.

    Without the adapters' rate, which the tuning sets and a record's setting holds; in its place
    stands the one that the file gave to every method before they were tuned.
    """
    cfg = _config(task, arm)
    optim = dataclasses.replace(cfg.optim, learning_rate=5e-4)
    parts = (cfg.init, cfg.model, cfg.data, cfg.method, cfg.router_steps, cfg.lora)
    parts += (cfg.router_optim, optim, cfg.train.steps, cfg.compute_dtype, cfg.z_loss)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def offered() -> tuple[str, ...]:
    """The methods that the config file knows, of those of the table."""
    from experiments.first.smollm2 import METHODS

    return tuple(method for method in TUNING if method in METHODS)


def tuning_jobs(task: str, method: str) -> list[Job]:
    """The tuning runs that choose a method's setting on a task, all of one length and seed."""
    task, arm = TUNED_ON[task], Arm(method, 0.0 if method == "none" else TUNING_SKIP)
    return [Job(task, arm, TUNING_SEED, tuple(c.items()), True) for c in TUNING[method]]


def chosen(
    task: str, method: str, known: Mapping[str, Mapping]
) -> tuple[tuple[str, object], ...] | None:
    """The setting of the lowest held-out loss among records; None before all runs are there."""
    jobs = tuning_jobs(task, method)
    found = [(known[job.name]["loss"], job.changes) for job in jobs if job.name in known]
    if len(found) != len(jobs):
        return None
    return min(found, key=lambda entry: (not math.isfinite(entry[0]), entry))[1]


def timed(jobs: Sequence[Job], here: Callable[[Job], bool]) -> list[Job]:
    """The runs whose time a token is measured: one of each arm with adapters, on each task.

    It is the first seed's, or the first whose run is still `here`. Other seeds, and the same layers
    without adapters (which are merged), run the same program over as many layers; `first_summary`
    gives them that time, and only where they ran as many.
    """
    arms: dict[tuple[str, Arm], list[Job]] = collections.defaultdict(list)
    for job in jobs:
        if job.arm.lora:
            arms[job.task, job.arm].append(job)
    return [next(filter(here, seeds), seeds[0]) for seeds in arms.values()]
