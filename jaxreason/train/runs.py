"""A run read back from its folder, and the numbers that runs are compared by."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from etils import epath

from jaxreason.core.errors import UserError
from jaxreason.train.goodput import Goodput, read_goodput
from jaxreason.train.log import read_metrics

Curve = Sequence[tuple[float, float]]
"""(step, value) pairs with rising steps."""

MISSING = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunData:
    """One run, as a report or a comparison sees it."""

    name: str
    """What tables and legends call it; unique among the runs shown together."""
    rows: Sequence[Mapping[str, Any]]
    """The rows of `metrics.jsonl`."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The resolved config, as in `config.json`."""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What was measured or looked up once, as in `facts.json`."""
    group: str | None = None
    """Runs of one group (the seeds of an arm) share a colour and a legend entry."""
    goodput: Goodput | None = None
    """Where the wall time of all attempts went, as in `goodput.jsonl`."""

    def series(self, kind: str, key: str) -> list[tuple[int, float]]:
        """Returns (step, value) of one metric, by rising step; non-finite values stay in."""
        found = {}
        for row in self.rows:
            value = row.get(key)
            if row.get("kind") == kind and _is_number(value):
                found[int(row["step"])] = float(value)  # A later row of a step replaces the first.
        return sorted(found.items())

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """The held-out loss by step, in nats a token, finite values only."""
        return [(step, loss) for step, loss in self.series("eval", "loss") if math.isfinite(loss)]

    @property
    def last_step(self) -> int:
        """The last step that left a row; 0 without rows."""
        return max((int(row["step"]) for row in self.rows), default=0)

    def last(self, kind: str, key: str) -> float | None:
        """The last finite value of a metric, or None."""
        curve = _finite(self.series(kind, key))
        return curve[-1][1] if curve else None

    def median(self, kind: str, key: str) -> float | None:
        """The median of a metric's finite values, or None."""
        values = [value for _, value in _finite(self.series(kind, key))]
        return statistics.median(values) if values else None

    @property
    def tokens(self) -> float | None:
        """Tokens trained on: the `tokens` metric, or steps times `tokens_per_step`."""
        return self._total("tokens", "tokens_per_step")

    @property
    def flops(self) -> float | None:
        """Floating-point operations spent: the `flops` metric, or steps times `flops_per_step`."""
        return self._total("flops", "flops_per_step")

    @property
    def wall_time_s(self) -> float | None:
        """Seconds of training: the `time_s` metric, or the span of the rows' clock times.

        `time_s` may start from 0 again where a run was resumed; the parts are added.
        """
        logged = [value for _, value in _finite(self.series("train", "time_s"))]
        if logged:
            ends = [a for a, b in zip(logged, logged[1:]) if b < a]
            return sum(ends) + logged[-1]
        stamps = [row["time_unix"] for row in self.rows if _is_number(row.get("time_unix"))]
        return max(stamps) - min(stamps) if len(stamps) > 1 else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation as a fraction: the median of `time_mfu`."""
        return self.median("train", "time_mfu")

    def _total(self, metric: str, per_step: str) -> float | None:
        logged = self.last("train", metric)
        if logged is not None:
            return logged
        rate = self.facts.get(per_step)
        return self.last_step * float(rate) if _is_number(rate) and self.last_step else None


def load_run(run_dir: epath.PathLike, name: str | None = None) -> RunData:
    """Reads a run's folder: `config.json` and `metrics.jsonl`, and what there is of the rest.

    Raises:
      UserError: not a run's folder, or a file in it is not what it should be.
    """
    run_dir = epath.Path(run_dir)
    if not (run_dir / "config.json").exists():
        raise UserError(f"{run_dir}: no config.json there; expected the folder of a run")
    return RunData(
        name=name or run_dir.name or str(run_dir),
        rows=read_metrics(run_dir),
        config=_read_dict(run_dir / "config.json"),
        facts=_read_dict(run_dir / "facts.json"),
        goodput=read_goodput(run_dir),
    )


def steps_to_reach(curve: Curve, value: float) -> float | None:
    """Returns the first step at which a falling curve is at or below `value`, or None.

    Between two points the curve is taken as a straight line.
    """
    before = None
    for step, here in _finite(curve):
        if here <= value:
            if before is None:
                return float(step)
            step_0, value_0 = before
            return step_0 + (step - step_0) * (value_0 - value) / (value_0 - here)
        before = (step, here)
    return None


def value_at(curve: Curve, step: float) -> float | None:
    """Returns a curve's value at a step, by straight lines between points; None outside them."""
    points = _finite(curve)
    for (step_0, value_0), (step_1, value_1) in zip(points, points[1:]):
        if step_0 <= step <= step_1:
            return value_0 + (value_1 - value_0) * (step - step_0) / (step_1 - step_0)
    if points and points[0][0] == step:  # A curve of one point.
        return points[0][1]
    return None


def speedup(baseline_curve: Curve, method_curve: Curve) -> float | None:
    """Returns how many times fewer steps the method takes to the same held-out loss.

    The loss is the higher of the two final ones, which both curves reach: the steps of the baseline
    to first reach it, divided by the method's. Below 1 the method is the slower one. Where the
    learning rate decays to its end, a curve's middle lies above what a run of that length would
    give, so for the better run this is a lower bound; runs annealed at several lengths are exact.

    Args:
      baseline_curve: (step, held-out loss) of the baseline.
      method_curve: the same of the method.

    Returns:
      The ratio; None where a curve has no usable points.
    """
    baseline, method = _finite(baseline_curve), _finite(method_curve)
    if not baseline or not method:
        return None
    loss = max(baseline[-1][1], method[-1][1])
    theirs, ours = steps_to_reach(baseline, loss), steps_to_reach(method, loss)
    return theirs / ours if theirs and ours else None


def difference_at_equal_steps(
    baseline_curve: Curve, method_curve: Curve
) -> tuple[float, float] | None:
    """Returns (the last step both curves cover, method's loss minus baseline's there), or None."""
    baseline, method = _finite(baseline_curve), _finite(method_curve)
    if not baseline or not method:
        return None
    step = min(baseline[-1][0], method[-1][0])
    a, b = value_at(baseline, step), value_at(method, step)
    return None if a is None or b is None else (step, b - a)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns a nested config as `{"train.steps": 200, ...}`; lists count as leaves."""
    if not isinstance(config, Mapping) or (not config and prefix):
        return {prefix: config}
    flat = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def config_differences(runs: Sequence[RunData]) -> list[tuple[str, list[Any]]]:
    """Returns (field, one value a run) for every config field that differs.

    A field that a run does not have holds `MISSING`.
    """
    flats = [flatten(run.config) for run in runs]
    fields = dict.fromkeys(field for flat in flats for field in flat)
    table = [(field, [flat.get(field, MISSING) for flat in flats]) for field in fields]
    return [(field, values) for field, values in table if any(v != values[0] for v in values)]


def _read_dict(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got {error}; restore the file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _finite(curve: Curve) -> list[tuple[float, float]]:
    return [(step, value) for step, value in curve if math.isfinite(value)]


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
