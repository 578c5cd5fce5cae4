"""The one executor of every recipe that trains: a config is built, then run, or goes on.

A recipe describes its programs, data and start (`Built`); what a run's folder may hold, restoring,
logs, preemption, samples and the report are the same for all of them. The run's folder is all there
is: killed and started again, the same command goes on where the newest sound checkpoint stands.
"""

import contextlib
import dataclasses
import functools
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

import jaxreason
from jaxreason import config as config_lib
from jaxreason import data
from jaxreason.core import flops
from jaxreason.core.errors import Preempted, UserError
from jaxreason.core.mesh import batch_sharding, use_mesh
from jaxreason.eval.perplexity import make_eval_step, perplexity
from jaxreason.recipes import facts as facts_lib
from jaxreason.recipes.open_model import keep_tokenizer
from jaxreason.recipes.program import Program
from jaxreason.recipes.resume import check_config, check_folder
from jaxreason.recipes.samples import write_samples
from jaxreason.train import state as state_lib
from jaxreason.train.checkpoint import Checkpointer
from jaxreason.train.clock import Clock
from jaxreason.train.log import MetricsLog
from jaxreason.train.loop import Run, train
from jaxreason.train.optim import make_schedule
from jaxreason.train.phase import Phase, active
from jaxreason.train.preempt import Preemption
from jaxreason.train.progress import Progress
from jaxreason.train.report import report_for_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run itself."""

    dir: str = ""
    """Folder of the run, local or in a bucket; it is resumed when it holds a checkpoint."""
    seed: int = 0
    """Seed of initial values and of everything random in training (data has its own)."""
    title: str = ""
    """Heading of the report."""
    expected: str = ""
    """The number to expect and where it is from, shown in the report."""
    samples: int = 0
    """Held-out texts that the report shows with the model's greedy continuation (one device only);
    each run then compiles generation too."""
    allow_changes: bool = False
    """Go on in a folder whose config differs; the run is then neither of the two."""


@dataclasses.dataclass
class Built(Program):
    """A run's parts, ready for the loop.

    `init_state()` makes the state before the first step, `fingerprint` is what a checkpoint must
    agree in to be restored, `files` travel beside the tokenizer, `facts` are the recipe's own.
    """

    train_data: data.Dataset
    held_out: data.Dataset
    init_state: Callable[[], state_lib.TrainState]
    fingerprint: dict[str, Any]
    files: Mapping[str, bytes]
    facts: dict[str, Any]

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This host's rows, as part of the global batch on the devices."""
        sharding = batch_sharding(self.mesh)
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Training batches on the devices, by step."""
        for step, batch in self.train_data.iterate(start, stop):
            yield step, self.put(batch)

    @functools.cached_property
    def _eval_steps(self) -> dict[Callable, Callable]:
        return {}

    def phase_of(self, state: state_lib.TrainState) -> Phase:
        """The phase that made a state; before the first step, the first."""
        return self.phases[active(self.phases, max(int(state.step) - 1, 0))]

    def groups(self, state: state_lib.TrainState) -> dict[str, Any]:
        """All parameters that a state's forward reads: its own, and what its phase keeps still."""
        frozen = self.phase_of(state).frozen.items()
        return {n: model.load() for n, model in frozen if model.apply is None} | state.params

    def evaluate(self, state: state_lib.TrainState) -> dict[str, float]:
        """Held-out loss of a state, by the forward of the phase that made it."""
        forward = self.phase_of(state).forward or self.forward
        if forward not in self._eval_steps:
            step = make_eval_step(forward, self.cfg.logit_chunk, self.held_out.completions_only)
            self._eval_steps[forward] = jax.jit(step)
        batches = (self.put(batch) for _, batch in self.held_out.iterate())
        params = self.groups(state)
        bytes_per_token = self.held_out.bytes_per_token
        return perplexity(self._eval_steps[forward], params, batches, bytes_per_token)

    def notes(self) -> list[str]:
        """Lines to show when the run begins."""
        return []

    def learning_rate(self, step: int) -> Any:
        """The learning rate after `step` updates, for the report."""
        return make_schedule(self.cfg.optim, self.cfg.train.steps)(step)

    def write_samples(self, directory: epath.Path, state: state_lib.TrainState) -> None:
        """What the trained model writes, for the report."""
        write_samples(
            directory, state.params["model"], self.cfg.model, self.held_out,
            dtype=self.cfg.compute_dtype, count=self.cfg.run.samples,
        )  # fmt: skip


def never_best(cfg: Any) -> bool:
    """Whether no periodic save is also evaluated, so that `keep_best` has nothing to compare."""
    saves, evaluations = cfg.checkpoint.every_steps, cfg.train.eval_every
    if not cfg.checkpoint.keep_best or not saves or saves > cfg.train.steps:
        return False
    return not evaluations or math.lcm(saves, evaluations) > cfg.train.steps


def run(cfg: Any, build: Callable[[Any], Built], *, command: str = "") -> epath.Path:
    """Trains, or goes on where the run's folder stands; returns the report's path.

    `cfg` is a recipe's config with the parts run, train, optim, checkpoint, mesh, model and data;
    `build` is that recipe's, and resolves it.
    """
    clock = Clock()
    if not cfg.run.dir:
        raise UserError("run.dir is not set; name the run's folder with --config.run.dir=...")
    directory = epath.Path(cfg.run.dir).expanduser()
    check_folder(directory)
    built = build(cfg)
    cfg = built.cfg
    config_json = config_lib.dump(cfg)
    facts = facts_lib.collect(built, command or shlex.join([sys.executable, *sys.argv]))
    facts_lib.check_same_run(directory, facts)
    facts_lib.check_same_on_hosts(facts)
    check_config(directory, cfg)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir {directory} cannot be made ({error.strerror}); choose another folder"
        ) from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_mesh(built.mesh))
        preemption = stack.enter_context(Preemption(cfg.checkpoint.on_preemption))
        checkpointer = stack.enter_context(
            Checkpointer(
                directory / "checkpoints",
                cfg.checkpoint,
                config_json=config_json,
                model_fingerprint=built.fingerprint,
                version=jaxreason.__version__,
            )
        )
        with clock.charge("load"):
            restored = checkpointer.latest(built.abstract_state)
            state = built.init_state() if restored is None else restored.state
        start = 0 if restored is None else restored.step
        if start > cfg.train.steps:
            raise UserError(
                f"{directory} holds a run of {start} steps, train.steps is {cfg.train.steps}; "
                "choose another run.dir"
            )
        log = stack.enter_context(MetricsLog(directory))
        log.truncate_after(start if restored else -1)
        if jax.process_index() == 0:
            config_lib.save(cfg, directory / "config.json")
            facts_lib.save(facts, directory)
            keep_tokenizer(built.train_data.tokenizer, directory / "tokenizer", built.files)
        progress = stack.enter_context(
            Progress(cfg.train.steps, cfg.run.title or directory.name, start=start)
        )
        for line in restored.skipped if restored else ():
            progress.note(f"passed over a damaged checkpoint: {line}")
        for line in built.notes():
            progress.note(line)
        if restored:
            progress.note(f"goes on after step {start}")
        if start == 0 and never_best(cfg):
            progress.note("checkpoint.keep_best keeps nothing: no save falls on an evaluation")
        peak = flops.peak_flops()
        state = train(
            Run(
                cfg=cfg.train,
                phases=built.phases,
                step_fn=built.step_fn,
                batches=built.batches,
                evaluate=built.evaluate,
                checkpointer=checkpointer,
                log=log,
                progress=progress,
                preemption=preemption,
                tokens_per_step=cfg.data.batch_size * cfg.data.seq_len,
                flops=built.flops,
                learning_rate=built.learning_rate,
                peak_flops=peak * built.mesh.size if peak else None,
                clock=clock,
            ),
            state,
            start,
        )
    done = int(state.step)
    if done < cfg.train.steps:
        raise Preempted(done)
    if cfg.run.samples and built.mesh.size == 1:
        built.write_samples(directory, state)
    return report_for_run(directory) if jax.process_index() == 0 else directory
