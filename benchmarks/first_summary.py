"""What FiRST's table says, from the runs on record: quality, speed, intervals, layer maps.

Scores are arrays [S,E] (seeds, test examples), the same examples for every arm. A mean's interval
is a bootstrap one over seeds and groups of examples; a difference is paired and has a Student-t
interval over seeds beside it (jaxreason.eval.bootstrap). The held-out loss, one number a run, has
that interval alone. A run counts where its setting is the one
that its method's tuning runs choose, and its seed one of its arm's; the others are counted in
`notes`.
"""

import collections
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.first_arms import METRICS, Arm
from benchmarks.first_counted import Arms, Run, check_same, current, tuning, with_times
from benchmarks.first_maps import between_tasks, layer_map
from jaxreason.eval.bootstrap import (
    Interval,
    difference_interval,
    group_index,
    mean_interval,
    seed_interval,
)

AGNOSTIC = ("unified", "evenly", "random", "influence", "cost", "layerskip")
RESAMPLES = 10_000
SAME_TIME = 0.02
"""Two shares of the full model's time no farther apart than this are not told apart."""


def summary(records: Mapping[str, dict]) -> dict:
    """All numbers of the report, by task."""
    counted, notes = current(records)
    out: dict = {"tuning": tuning(records), "notes": notes, "tasks": {}}
    for task in METRICS:
        arms: dict[str, list[Run]] = collections.defaultdict(list)
        for record in counted:
            if record["task"] == task and "test" in record:
                arms[Arm(**record["arm"]).label].append(record)
        if not arms:
            continue
        for runs in arms.values():
            runs.sort(key=lambda run: run["seed"])
        check_same(task, [run for runs in arms.values() for run in runs])
        out["tasks"][task] = task_summary(task, with_times(arms))
    out["between_tasks"] = between_tasks(out["tasks"])
    return out


def scores(runs: Sequence[Run], metric: str) -> np.ndarray:
    """Scores [S,E] of an arm's runs, by rising seed."""
    return np.array([run["test"]["scores"][metric] for run in runs])


def groups(runs: Sequence[Run]) -> list[str] | None:
    """The group of each test example; None where the records do not tell (each its own)."""
    return runs[0]["test"].get("groups")


def task_summary(task: str, arms: Arms) -> dict:
    """Every arm of a task, FiRST against each peer, what adapters recover, and the layer maps."""
    some = next(iter(arms.values()))
    count, names = len(some[0]["test"]["sets"]), groups(some)
    out: dict = {"examples": count, "arms": {}}
    out["groups"] = int(group_index(names, count).max()) + 1
    for name, runs in sorted(arms.items()):
        out["arms"][name] = arm_summary(task, runs)
    found = [
        {"arm": a, "other": b, "metric": m, **entry}
        for m in METRICS[task]
        for a, b in pairs(arms)
        if (entry := difference(arms[a], arms[b], m)) is not None
    ]
    out["differences"] = found
    out["at_equal_time"] = [
        entry
        for metric in METRICS[task]
        for name in sorted(arms)
        if name.startswith("first-") and not name.endswith("-plain")
        for peer in AGNOSTIC
        if (entry := at_equal_time(arms, name, peer, metric)) is not None
    ]
    out["losses"] = [
        {"arm": a, "other": b, **entry}
        for a, b in pairs(arms)
        if (entry := loss_difference(arms[a], arms[b])) is not None
    ]
    out["recovered"] = {m: recovered(out["arms"], m) for m in METRICS[task]}
    out["maps"] = {
        name: layer_map(runs) for name, runs in sorted(arms.items()) if name.startswith("first-")
    }
    out["fixed_sets"] = {
        name: [run["test"]["sets"][0] for run in runs]
        for name, runs in sorted(arms.items())
        if not name.startswith(("first-", "none")) and not name.endswith("-plain")
    }
    return out


def pairs(arms: Arms) -> list[tuple[str, str]]:
    """The differences that the claim speaks of: FiRST and peers at one rate, and adapters."""
    found = []
    for name in sorted(arms):
        method, _, rest = name.partition("-")
        if method == "first":
            found += [(name, f"{peer}-{rest}") for peer in AGNOSTIC]
        if not name.endswith("-plain"):
            found += [(name, f"{name}-plain"), (name, "none")]
    return [(a, b) for a, b in found if a != b and a in arms and b in arms]


def arm_summary(task: str, runs: Sequence[Run]) -> dict:
    """One arm: scores with intervals, layers run, time a token, cost."""
    out: dict = {"arm": runs[0]["arm"], "setting": runs[0]["setting"]}
    out["seeds"] = [run["seed"] for run in runs]
    for metric in METRICS[task]:
        array = scores(runs, metric)
        out[metric] = interval(mean_interval(array, groups(runs), resamples=RESAMPLES))
        out[metric]["by_seed"] = array.mean(1).tolist()
    out["layers"] = [
        statistics.fmean(s.count("1") for s in run["test"]["sets"]) for run in runs
    ]  # Mean over examples, by seed.
    out["finished"] = [run["test"]["means"]["finished"] for run in runs]
    for key in ("tokens", "learned_tokens", "flops", "wall_s", "loss"):
        out[key] = [run.get(key) for run in runs]
    timed = [run["time"] for run in runs if "time" in run]
    if len(timed) == len(runs):
        for key in ("seconds_per_token", "all_layers", "ratio"):
            out[key] = statistics.fmean(entry[key] for entry in timed)
    return out


def recovered(arms: Mapping[str, Mapping], metric: str) -> dict[str, dict]:
    """What skipping costs by arm, in points below no skipping, and what adapters give back of it.

    `plain`: neither has adapters; `adapted`: both have; `share`: how far adapters bring the arm
    from where it was without them to no skipping with them (None where it was no lower).
    """
    out = {}
    for name, arm in arms.items():
        plain = arms.get(f"{name}-plain")
        if plain is None or name == "none" or not {"none", "none-plain"} <= arms.keys():
            continue
        low, here = plain[metric]["mean"], arm[metric]["mean"]
        full, untouched = (arms[n][metric]["mean"] for n in ("none", "none-plain"))
        share = (here - low) / (full - low) if full > low else None
        out[name] = {"plain": untouched - low, "adapted": full - here, "share": share}
    return out


def interval(found: Interval) -> dict:
    """An interval as JSON."""
    return {"mean": found.mean, "low": found.low, "high": found.high}


def one_seed(run: Run) -> bool:
    """Whether a run's arm has a single seed by design."""
    return len(Arm(**run["arm"]).seeds) == 1


def same_seeds(*arms: Sequence[Run]) -> list[list[Run]] | None:
    """The runs of the seeds that all arms have; an arm of one seed by design stands as it is.

    Runs that are missing make the comparison smaller, never one run stand for several. None where
    nothing is left.
    """
    several = [{run["seed"] for run in runs} for runs in arms if not one_seed(runs[0])]
    both = set.intersection(*several) if several else None
    found = [
        [run for run in runs if one_seed(run) or both is None or run["seed"] in both]
        for runs in arms
    ]
    return found if all(found) else None


def difference(runs: Sequence[Run], others: Sequence[Run], metric: str) -> dict | None:
    """Scores of `runs` minus `others`, over the seeds that both have; None without any."""
    found = same_seeds(runs, others)
    if found is None:
        return None
    a, b = found
    return compared(a, scores(a, metric), scores(b, metric), len(a) == len(b))


def loss_difference(runs: Sequence[Run], others: Sequence[Run]) -> dict | None:
    """Held-out loss, nats a token, of `runs` minus that of `others`; None without a common seed."""
    found = same_seeds(runs, others)
    if found is None:
        return None
    a, b = (np.array([run["loss"] for run in side]) for side in found)
    out = {"mean": float((a - b).mean()), "seeds": max(len(a), len(b)), "seeds_t": None}
    if len(a) == len(b) > 1:
        over = seed_interval((a - b).tolist())
        out["seeds_t"] = {"n": len(a), "low": over.low, "high": over.high}
    return out


def compared(runs: Sequence[Run], x: np.ndarray, y: np.ndarray, by_seed: bool) -> dict:
    """A paired difference with both its intervals; `seeds_t` only where seed stands by seed."""
    out = interval(difference_interval(x, y, groups(runs), resamples=RESAMPLES))
    rows = max(len(x), len(y))
    out |= {"seeds": rows, "seeds_t": None}
    if by_seed and rows > 1:
        over = seed_interval((x - y).mean(1).tolist())
        out["seeds_t"] = {"n": rows, "low": over.low, "high": over.high}
    return out


def at_equal_time(arms: Arms, name: str, peer: str, metric: str) -> dict | None:
    """FiRST's score minus the peer's at FiRST's measured time a token.

    The peer's scores between two of its rates (or a rate and no skipping) are taken as a straight
    line in measured time, example by example, over the seeds that FiRST and all points have. None
    where something is not timed or no seed is common, or FiRST is faster or slower than all that
    the peer has by more than the noise of timing (SAME_TIME). Times count as known exactly.
    """
    points = [runs for n, runs in arms.items() if is_trained(n, peer)]
    points += [arms["none"]] if "none" in arms else []
    if not any(is_trained(n, peer) for n in arms):
        return None
    if not all("time" in run for runs in (*points, arms[name]) for run in runs):
        return None
    common = same_seeds(arms[name], *points)
    if common is None:
        return None
    first, *points = common
    points.sort(key=mean_ratio)
    here, ends = mean_ratio(first), (mean_ratio(points[0]), mean_ratio(points[-1]))
    if ends[0] - SAME_TIME <= here <= ends[1] + SAME_TIME:
        here = min(max(here, ends[0]), ends[1])
    brackets = list(zip(points, points[1:])) or [(points[0], points[0])]
    for fast, slow in brackets:
        low, high = mean_ratio(fast), mean_ratio(slow)
        if low <= here <= high:
            share = (here - low) / (high - low) if high > low else 0.0
            mixed = (1 - share) * scores(fast, metric) + share * scores(slow, metric)
            # "No skipping" has one seed; where the peer has as many as FiRST, they stand in pairs.
            found = compared(first, scores(first, metric), mixed, len(first) == len(mixed))
            return {"arm": name, "other": peer, "metric": metric, "ratio": here, **found}
    return None


def is_trained(name: str, method: str) -> bool:
    """Whether an arm is of the method, with adapters."""
    return name.startswith(f"{method}-skip") and not name.endswith("-plain")


def mean_ratio(runs: Sequence[Run]) -> float:
    """Time a token over that of all layers, a mean over seeds."""
    return statistics.fmean(run["time"]["ratio"] for run in runs)
