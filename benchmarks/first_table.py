"""Runs the arms of FiRST's table on SmolLM2-135M, scores them, times them, and sums them up.

    python -m benchmarks.first_table --stage=tune       # three settings a method, on a seed apart
    python -m benchmarks.first_table --stage=main       # FiRST, Unified, random: 3 seeds; peers: 1
    python -m benchmarks.first_table --stage=evaluate   # answers to the test examples, scored
    python -m benchmarks.first_table --stage=time       # seconds a token, batch 1, nothing else
    python -m benchmarks.first_table --stage=summary    # docs/results/first.json and first.html

Two tasks: docstrings (ROUGE-L, chrF; test packages that training never saw) and gsm_symbolic (exact
answer; other seed, other questions). A run is `experiments/first/smollm2.py:TASK,METHOD,skip=R,
seed=N`; `--list` prints the runs of a stage. What is on record (docs/results/first_runs.json) is
not done again, a run that was killed goes on, and a scoring goes on behind its last line.

Every trained method has the same number of tuning runs (TUNING), at 20 % skipped and half length,
judged by the loss on held-out examples of the training part; test examples are read by `evaluate`
alone. An arm with adapters and one without have one setting.

Time on 2 CPU cores with AMX and nothing beside, reckoned from 0.32 TFLOP/s in training (4 FLOPs a
parameter and token under adapters, 2 more where FiRST reads all statistics first) for the 245,760
tokens of a run: 7 minutes, FiRST 11, and 2 to 4 to compile. So `tune` (30 runs of half length) 3
hours, `main` (42 runs with adapters, 18 without) 8, `evaluate` (4 minutes a run) 4, `time` 1.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

from jaxreason.train.runs import load_run

CONFIG = "experiments/first/smollm2.py"
ROOT = pathlib.Path("runs/first")
RECORDS = pathlib.Path("docs/results/first_runs.json")
OUT = pathlib.Path("docs/results/first.json")
PAGE = pathlib.Path("docs/results/first.html")
TASKS = ("docstrings", "gsm_symbolic")
SKIPS = (0.2, 0.4)
SEEDS = (1, 2, 3)
TUNING_SEED = 100
TUNING_SKIP = 0.2
COMPARED = ("first", "unified", "random")
PEERS = ("none", "influence")
"""One seed. `layerskip` joins when its config is there."""
_RATES = [{"optim.learning_rate": rate} for rate in (2e-4, 5e-4, 1e-3)]
# FiRST's runs vary the routers too: as many runs as the others have, for more settings.
TUNING: dict[str, list[dict[str, object]]] = {
    "none": _RATES,
    "unified": _RATES,
    "random": _RATES,
    "influence": _RATES,
    "first": [
        {"optim.learning_rate": 5e-4, "router_optim.learning_rate": 1e-3},
        {"optim.learning_rate": 1e-3, "router_optim.learning_rate": 1e-3},
        {"optim.learning_rate": 1e-3, "router_optim.learning_rate": 3e-3},
    ],
}
LEAST_TOKENS = 200_000


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


ARMS = tuple(
    Arm(method, skip, lora)
    for lora in (True, False)
    for skip in (*SKIPS, 0.0)
    for method in (*COMPARED, *PEERS)
    if (method == "none") == (skip == 0.0)
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

    def config(self) -> list[str]:
        """The config and its overrides, as flags."""
        given = f"{self.task},{self.arm.method},skip={self.arm.skip:g},seed={self.seed}"
        changes = {
            "run.dir": self.folder,
            "run.title": self.name,
            "data.source.part": "train",
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


def given_length(task: str, arm: Arm) -> tuple[int, int]:
    """The updates that the config file gives an arm: all, and those of the routers."""
    from jaxreason import config as config_lib
    from jaxreason.recipes import recipes

    known = {f"{cls.__module__}.{cls.__name__}": cls for cls in recipes()}
    arg = f"--config={CONFIG}:{task},{arm.method},skip={arm.skip:g},seed=1"
    cfg = config_lib.parse([arg], recipes=known).config
    return cfg.train.steps, cfg.router_steps


def records() -> dict[str, dict]:
    """What is on record, by the name of the run."""
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def keep_record(name: str, **entries: object) -> None:
    """Adds entries to a run's record."""
    known = records()
    known[name] = {**known.get(name, {}), **entries}
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    new = RECORDS.with_suffix(".new")
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(known.items())]
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(new, RECORDS)


def trained(job: Job) -> dict | None:
    """A run's record, from its folder where it has just ended; None where it is not complete."""
    known = records().get(job.name)
    if known is None and (job.folder / "report.html").exists():  # What a run writes last.
        data = load_run(job.folder)
        last = [row for row in data.rows if row["kind"] == "eval"][-1]
        facts = ("commit", "version", "python", "jax", "jaxlib", "device", "corpus_sha256")
        keep_record(
            job.name,
            task=job.task,
            arm=dataclasses.asdict(job.arm),
            seed=job.seed,
            setting={field: value for field, value in job.changes},
            loss=last["loss"],
            steps=data.last_step,
            tokens=data.tokens,
            flops=data.flops,
            wall_s=data.wall_time_s,
            kept_layers=last.get("depth/kept_layers"),
            facts={key: data.facts.get(key) for key in facts},
        )
        known = records()[job.name]
    return known


def tuning_jobs(task: str, method: str) -> list[Job]:
    """A method's tuning runs, all of one length and seed."""
    arm = Arm(method, 0.0 if method == "none" else TUNING_SKIP)
    return [Job(task, arm, TUNING_SEED, tuple(c.items()), True) for c in TUNING[method]]


def setting(task: str, method: str) -> tuple[tuple[str, object], ...] | None:
    """The setting of the lowest held-out loss; None before all tuning runs are on record."""
    found = [(entry["loss"], job.changes) for job in tuning_jobs(task, method)
             if (entry := trained(job)) is not None]  # fmt: skip
    return min(found)[1] if len(found) == len(TUNING[method]) else None


def main_jobs(tasks: list[str]) -> list[Job]:
    """Every arm with its tuned setting, seed by seed, so that a stop leaves whole comparisons."""
    jobs = []
    for seed in SEEDS:
        for task in tasks:
            for arm in ARMS:
                changes = setting(task, arm.method)
                if changes is None:
                    sys.exit(f"error: {arm.method} is not tuned on {task}; --stage=tune")
                if seed in arm.seeds:
                    jobs.append(Job(task, arm, seed, changes))
    return jobs


def run(command: list[str], what: str) -> None:
    """Runs one command to its end; its failure ends the table."""
    print(f"{time.strftime('%H:%M')} {what}", flush=True)
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code:
        sys.exit(f"error: {what} ended with exit code {code}: {' '.join(command)}")


def train(jobs: list[Job], until: float) -> None:
    """Trains what is not on record, and starts nothing after `until`."""
    for job in jobs:
        if trained(job) is None and time.time() < until:
            run(job.command(), job.name)
            entry = trained(job)
            if entry is None:
                sys.exit(f"error: {job.name} ended without a report")
            print(f"   held-out loss {entry['loss']:.4f}, {entry['wall_s']:.0f} s", flush=True)
            if job.arm.lora and not job.tuning and entry["tokens"] < LEAST_TOKENS:
                sys.exit(f"error: {job.name} saw {entry['tokens']:.0f} tokens of {LEAST_TOKENS:,}")


def measure(jobs: list[Job], what: str, examples: int, until: float) -> None:
    """Scores or times the trained runs for which that is not on record."""
    for job in jobs:
        entry = trained(job)
        if entry is None or what in entry or time.time() > until:
            continue
        out = job.folder / f"{what}.json"
        if not out.exists():
            command = [sys.executable, "-m", "benchmarks.first_score", what, str(job.folder)]
            run([*command, job.task, str(examples), str(out)], f"{what} {job.name}")
        keep_record(job.name, **{what: json.loads(out.read_text())})


def main() -> None:
    """Runs a stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    stages = ["tune", "main", "evaluate", "time", "summary"]
    parser.add_argument("--stage", choices=stages, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(TUNING), help="methods to tune")
    parser.add_argument("--examples", type=int, default=200, help="test examples of a task")
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing after these")
    parser.add_argument("--list", action="store_true", help="print the runs and do nothing")
    args = parser.parse_args()
    until, tasks = time.time() + 60 * args.minutes, args.tasks.split(",")
    for flag, got, known in (("tasks", tasks, TASKS), ("methods", args.methods.split(","), TUNING)):
        if unknown := [name for name in got if name not in known]:
            parser.error(f"--{flag}: {unknown[0]!r}; expected some of {', '.join(known)}")
    if args.stage == "summary":
        from benchmarks.first_report import write
        from benchmarks.first_summary import summary

        result = summary(records())
        OUT.write_text(json.dumps(result, indent=1) + "\n")
        write(PAGE, result)
        print(f"written: {OUT}, {PAGE}")
        return
    if args.stage == "tune":
        jobs = [j for t in tasks for m in args.methods.split(",") for j in tuning_jobs(t, m)]
    else:
        jobs = main_jobs(tasks)
    if args.list:
        print("\n".join(f"{'done' if trained(job) else '    '} {job.name}" for job in jobs))
    elif args.stage in ("tune", "main"):
        train(jobs, until)
    elif args.stage == "evaluate":
        measure(jobs, "test", args.examples, until)
    else:
        measure(jobs, "time", 8, until)


if __name__ == "__main__":
    main()
