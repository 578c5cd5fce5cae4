"""The loop: phases in turn, evaluation, checkpoints, rows; it knows arrays and callables only."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxreason.core.errors import UserError
from jaxreason.train.checkpoint import Checkpointer
from jaxreason.train.clock import Clock, training
from jaxreason.train.goodput import GoodputLog, read_goodput
from jaxreason.train.log import MetricsLog
from jaxreason.train.phase import Phase, active
from jaxreason.train.preempt import Preemption
from jaxreason.train.profile import Profiler
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
    eval_at_start: bool = True
    """Whether the untrained state is evaluated too."""
    max_bad_steps: int = 10
    """Non-finite steps in a row (each skipped) after which the run stops with an error."""
    profile_at: tuple[int, ...] = ()
    """Updates (the first is 1) at which a profiler trace begins; `20,220` takes two. A trace is
    written to the run's folder `profile` and slows the steps that it covers."""
    profile_steps: int = 3
    """Updates that a trace covers."""

    def validate(self) -> None:
        """Raises UserError for values outside their range."""
        at_least_1 = ("steps", "accumulate", "log_every", "max_bad_steps", "profile_steps")
        for name, least in {**dict.fromkeys(at_least_1, 1), "eval_every": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"train.{name} is {getattr(self, name)}; expected {least} or more")
        at, each = sorted(self.profile_at), self.profile_steps
        last = self.steps - each + 1
        if at and (at[0] < 1 or at[-1] > last or any(b < a + each for a, b in zip(at, at[1:]))):
            got = ",".join(map(str, self.profile_at))
            raise UserError(
                f"train.profile_at is {got}; expected updates from 1 to {last}, each at least "
                f"train.profile_steps ({each}) after the one before"
            )


@dataclasses.dataclass
class Run:
    """What the loop works with; a recipe fills it in.

    `step_fn(phase)` gives the jitted step, `batches(start, stop)` yields (step, batch on the
    devices), `evaluate(state)` gives {"loss": ...} of the held-out text, `flops(phase)` the FLOPs a
    step, `learning_rate(step)` what rows report, `peak_flops` all devices' together or None.
    `after_eval(state, results) -> state` may change the state at an evaluation. `clock` has run
    since the attempt began; a recipe that does much before the loop makes it first and charges what
    it does.
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
    clock: Clock = dataclasses.field(default_factory=Clock)


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
    try:
        loop.begin()
        while loop.step < run.cfg.steps and not loop.stopped:
            index = active(run.phases, loop.step)
            phase, begin = run.phases[index], run.phases[index - 1].until if index else 0
            # At the phase's first step: a resumed run writes no row that a straight one would not.
            run.log.write(begin, "event", name="phase", phase=phase.name)
            loop.run_phase(phase, min(phase.until, run.cfg.steps))
        loop.finish()
    except BaseException as error:
        loop.fail(error)
        raise
    finally:
        run.clock.close()
    return loop.state


class _Loop:
    """The loop's few moving parts: the state, the row in flight, the clock."""

    def __init__(self, run: Run, state: TrainState, start: int):
        self.run, self.state, self.step, self.start = run, state, start, start
        self.stopped, self.clock = False, run.clock
        self.pending: tuple[int, Any] | None = None
        self.results: dict[str, float] | None = None
        folder = run.log.path.parent
        self.profiler = Profiler(folder, run.cfg.profile_at, run.cfg.profile_steps)
        # A finished run that is started again trains nothing, and adds nothing to its accounts.
        self.goodput = GoodputLog(folder, self.clock, start) if start < run.cfg.steps else None
        self.row = dict.fromkeys(self.clock.seconds(), 0.0)  # Seconds by cause at the row before.
        self.paced, self.steps = 0.0, 0  # Seconds of training, and steps, since the last pace.

    def begin(self) -> None:
        self.clock.switch("other")
        if self.start == 0 and self.run.cfg.eval_at_start:
            self.evaluate()
        self.paced = training(self.clock.seconds())

    def run_phase(self, phase: Phase, stop: int) -> None:
        run, clock, began = self.run, self.clock, self.clock.seconds()
        step_fn = run.step_fn(phase)
        with clock.charge("load"):
            frozen = {name: model.load() for name, model in phase.frozen.items()}
        batches = run.batches(self.step, stop)
        first = True
        while self.step < stop and not self.stopped:
            step = self.step + 1
            if self.profiler.begins(step):
                self.trace(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                with clock.charge("startup" if first else "data"):
                    _, batch = next(batches)
                with clock.charge("compile" if first else "compute"):
                    self.state, metrics = step_fn(self.state, frozen, batch)
                    if first:  # It compiles, and counts for no pace.
                        jax.block_until_ready(metrics["grad_norm"])
                    else:
                        clock.begun(step, metrics["grad_norm"])
                self.drain()  # The row before: the device already works on this step.
            self.step, self.pending = step, (step, metrics)
            if first:
                now = clock.seconds()
                took = sum(now.values()) - sum(began.values())
                run.progress.note(f"phase {phase.name}: first step after {took:.1f} s")
            self.steps += not first
            first = False
            if self.profiler.ends(step):
                self.end_trace()
            self.boundary()
        if not self.stopped:
            next(batches, None)  # Ends the iterator, and lets go what it holds.
        self.drain()

    def trace(self, step: int) -> None:
        """Begins a trace with update `step`, on idle devices, so that it holds no other's work."""
        self.drain()
        with self.clock.charge("profile"):
            self.profiler.start(step)

    def end_trace(self) -> None:
        """Writes the running trace once its last update is done."""
        self.drain()
        with self.clock.charge("profile"):
            folder = self.profiler.stop(self.step)
        self.run.progress.note(f"step {self.step}: trace in {folder}")

    def boundary(self) -> None:
        """After an update: evaluation, checkpoint, preemption."""
        run, cfg = self.run, self.run.cfg
        last = self.step == cfg.steps
        stop = run.preemption.requested(self.step)
        evaluate = last or (cfg.eval_every and self.step % cfg.eval_every == 0)
        save = run.checkpointer.due(self.step) or last or stop
        if evaluate or save:
            self.drain()
        if evaluate:
            self.evaluate()
        if save:
            with self.clock.charge("checkpoint"):
                run.log.flush()
                run.checkpointer.save(self.step, self.state, self.results if evaluate else None)
        if self.goodput and (evaluate or save or self.goodput.due()):
            self.goodput.lap(self.step)
        self.stopped = stop and not last

    def evaluate(self) -> None:
        with self.clock.charge("eval"):
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
        self.clock.ended(step)
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
        run, now = self.run, self.clock.seconds()
        parts = {cause: round(now[cause] - self.row[cause], 6) for cause in now}
        self.row = now
        out = {"time_s": training(now), "time_interval_s": sum(parts.values())}
        out |= {f"time_in_{cause}_s": seconds for cause, seconds in parts.items() if seconds}
        # A step may run inside its own dispatch (CPU), before the row of the step before it is
        # written: one step's time says nothing, it goes into the next pace.
        if self.steps > 1:
            pace = self.steps / (training(now) - self.paced)
            out |= {"time_tokens_per_s": pace * run.tokens_per_step, "time_step_s": 1 / pace}
            if run.peak_flops:
                phase = run.phases[active(run.phases, step - 1)]
                out["time_mfu"] = pace * run.flops(phase) / run.peak_flops
            self.paced, self.steps = training(now), 0
        return out

    def finish(self) -> None:
        """Waits for what is still being written, and says where the time went."""
        if self.profiler.running:  # Stopped by a preemption inside a trace.
            self.end_trace()
        self.drain()
        with self.clock.charge("checkpoint"):
            self.run.checkpointer.wait()
            self.run.log.flush()
        if self.goodput is None or not self.goodput.primary:
            return
        self.goodput.end(self.step, "preempted" if self.stopped else "done")
        if self.goodput.error is not None:
            self.run.progress.note(f"goodput is not recorded: {self.goodput.error}")
        elif (found := read_goodput(self.run.log.path.parent)) is not None:
            self.run.progress.note(found.line())

    def fail(self, error: BaseException) -> None:
        """Keeps the running trace and the accounts of a run that ends with an error."""
        if self.profiler.running:
            try:
                self.profiler.stop(self.step)
            except Exception as second:
                error.add_note(f"the running trace is lost: {second}")
        if self.goodput is not None:
            self.goodput.end(self.step, type(error).__name__)
