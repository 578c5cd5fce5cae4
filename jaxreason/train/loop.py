"""The loop: phases in turn, evaluation, checkpoints, rows; it knows arrays and callables only."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxreason.core.errors import UserError
from jaxreason.train.checkpoint import Checkpointer
from jaxreason.train.log import MetricsLog
from jaxreason.train.phase import Phase, active
from jaxreason.train.preempt import Preemption
from jaxreason.train.progress import Progress
from jaxreason.train.state import TrainState

SHOWN = ("loss", "time_tokens_per_s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and rhythm of a run."""

    steps: int = 1000
    """Optimiser updates."""
    accumulate: int = 1
    """Micro-batches an update; divides the batch, changes nothing but memory."""
    log_every: int = 10
    """Steps between two rows of training metrics."""
    eval_every: int = 100
    """Steps between two evaluations on held-out text; 0 evaluates only at the start and the end."""
    max_bad_steps: int = 10
    """Non-finite steps in a row (each skipped) after which the run stops with an error."""

    def validate(self) -> None:
        """Raises UserError for values outside their range."""
        for name, least in {"steps": 1, "accumulate": 1, "log_every": 1, "eval_every": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"train.{name} is {getattr(self, name)}; expected {least} or more")
        if self.max_bad_steps < 1:
            raise UserError(f"train.max_bad_steps is {self.max_bad_steps}; expected 1 or more")


@dataclasses.dataclass
class Run:
    """What the loop works with; a recipe fills it in.

    `step_fn(phase)` gives the jitted step, `batches(start, stop)` yields (step, batch on the
    devices), `evaluate(state)` gives {"loss": ...} of the held-out text, `flops(phase)` the FLOPs a
    step, `learning_rate(step)` what rows report, `peak_flops` all devices' together or None.
    `after_eval(state, results) -> state` may change the state at an evaluation.
    """

    cfg: TrainConfig
    phases: Sequence[Phase]
    step_fn: Callable[[Phase], Callable]
    batches: Callable[[int, int], Iterator[tuple[int, Any]]]
    evaluate: Callable[[TrainState], dict[str, float]]
    checkpointer: Checkpointer
    log: MetricsLog
    progress: Progress
    preemption: Preemption
    tokens_per_step: int
    flops: Callable[[Phase], float]
    learning_rate: Callable[[int], Any]
    peak_flops: float | None = None
    after_eval: Callable[[TrainState, dict[str, float]], TrainState] | None = None


@dataclasses.dataclass
class Clock:
    """Seconds of training, without compiling, evaluating and saving.

    `total` since the run (or its resumption) began; `seconds`, `data` (waiting for a batch) and
    `steps` since the last row.
    """

    total: float = 0.0
    seconds: float = 0.0
    data: float = 0.0
    steps: int = 0
    since: float | None = None

    def start(self) -> None:
        """Goes on counting."""
        self.since = time.perf_counter()

    def stop(self) -> None:
        """Stops counting; what has passed is kept."""
        if self.since is not None:
            passed = time.perf_counter() - self.since
            self.total, self.seconds, self.since = self.total + passed, self.seconds + passed, None

    def new_row(self) -> None:
        """Begins the next row's interval."""
        self.seconds, self.data, self.steps = 0.0, 0.0, 0


def flops_until(run: Run, step: int) -> float:
    """FLOPs of the first `step` updates; a resumed run counts those before it too."""
    total, begin = 0.0, 0
    for phase in run.phases:
        total += run.flops(phase) * max(0, min(step, phase.until) - begin)
        begin = phase.until
    return total


def train(run: Run, state: TrainState, start: int) -> TrainState:
    """Trains from `start` updates to the end, or to a preemption; the state is donated.

    Returns the last state. A stop by preemption has saved it and leaves `state.step` below the
    configured steps.
    """
    loop = _Loop(run, state, start)
    while loop.step < run.cfg.steps and not loop.stopped:
        index = active(run.phases, loop.step)
        phase, begin = run.phases[index], run.phases[index - 1].until if index else 0
        # At the phase's first step: a resumed run writes no row that a straight one would not.
        run.log.write(begin, "event", name="phase", phase=phase.name)
        loop.run_phase(phase, min(phase.until, run.cfg.steps))
    loop.finish()
    return loop.state


class _Loop:
    """The loop's few moving parts: the state, the row in flight, the clock."""

    def __init__(self, run: Run, state: TrainState, start: int):
        self.run, self.state, self.step = run, state, start
        self.stopped, self.clock = False, Clock()
        self.pending: tuple[int, Any] | None = None
        self.results: dict[str, float] | None = None
        if start == 0:
            self.evaluate()

    def run_phase(self, phase: Phase, stop: int) -> None:
        run = self.run
        step_fn = run.step_fn(phase)
        frozen = {name: model.load() for name, model in phase.frozen.items()}
        began, first = time.perf_counter(), True
        batches = run.batches(self.step, stop)
        while True:
            waited = time.perf_counter()
            item = next(batches, None)
            ready = time.perf_counter()
            if item is None:
                break
            self.state, metrics = step_fn(self.state, frozen, item[1])
            self.drain()  # The row before: the device already works on the next step.
            self.step += 1
            self.pending = (self.step, metrics)
            if first:  # It compiles, and counts for no pace.
                jax.block_until_ready(metrics["grad_norm"])
                compile_s = time.perf_counter() - began
                run.progress.note(f"phase {phase.name}: first step after {compile_s:.1f} s")
                self.clock.start()
                first = False
            else:
                self.clock.data += ready - waited
                self.clock.steps += 1
            self.boundary()
            if self.stopped:
                break
        self.drain()
        self.clock.stop()

    def boundary(self) -> None:
        """After an update: evaluation, checkpoint, preemption."""
        run, cfg = self.run, self.run.cfg
        last = self.step == cfg.steps
        stop = run.preemption.requested(self.step)
        evaluate = last or (cfg.eval_every and self.step % cfg.eval_every == 0)
        save = run.checkpointer.due(self.step) or last or stop
        if not (evaluate or save):
            return
        self.drain()
        self.clock.stop()
        if evaluate:
            self.evaluate()
        if save:
            run.log.flush()
            run.checkpointer.save(self.step, self.state, self.results if evaluate else None)
        self.stopped = stop and not last
        self.clock.start()

    def evaluate(self) -> None:
        self.results = self.run.evaluate(self.state)
        self.run.log.write(self.step, "eval", **self.results)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in self.results.items())
        self.run.progress.note(f"step {self.step} held out: {shown}")
        if self.run.after_eval is not None:
            self.state = self.run.after_eval(self.state, self.results)

    def drain(self) -> None:
        """Waits for the row in flight, checks it, and writes it where a row is due."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        run, cfg = self.run, self.run.cfg
        streak = int(metrics["streak"])
        if streak:
            run.progress.note(f"step {step}: not finite, skipped ({streak} in a row)")
        if streak >= cfg.max_bad_steps:
            raise UserError(
                f"{streak} steps in a row up to step {step} had a loss or gradient that was not "
                "finite; lower the learning rate or look at the data, then start again from the "
                "last checkpoint"
            )
        if step % cfg.log_every and step != cfg.steps:
            return
        values = {name: float(value) for name, value in metrics.items() if name != "streak"}
        values["loss"] = values.pop("nll", values["total"])
        # Skipped steps did not advance the schedule.
        updates = step - 1 - int(metrics["skipped"])
        values["learning_rate"] = float(run.learning_rate(max(updates, 0)))
        values |= {"tokens": step * run.tokens_per_step, "flops": flops_until(run, step)}
        timing = self.timing(step)
        run.log.write(step, "train", **values, **timing)
        run.progress.update(step, **{k: v for k, v in (values | timing).items() if k in SHOWN})

    def timing(self, step: int) -> dict[str, float]:
        """The row's `time_*` fields, of the interval since the row before."""
        run, clock = self.run, self.clock
        running = clock.since is not None
        clock.stop()
        out = {"time_s": clock.total}
        # A step may run inside its own dispatch (CPU), before the row of the step before it is
        # written: one step's time says nothing, it goes into the next row's interval.
        if clock.steps > 1:
            pace = clock.steps / clock.seconds
            out |= {
                "time_tokens_per_s": pace * run.tokens_per_step,
                "time_step_s": 1 / pace,
                "time_data_s": clock.data / clock.steps,
            }
            if run.peak_flops:
                phase = run.phases[active(run.phases, step - 1)]
                out["time_mfu"] = pace * run.flops(phase) / run.peak_flops
            clock.new_row()
        if running:
            clock.start()
        return out

    def finish(self) -> None:
        self.drain()
        self.run.checkpointer.wait()
        self.run.log.flush()
