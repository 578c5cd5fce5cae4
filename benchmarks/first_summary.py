"""What FiRST's table says, from the runs on record: quality, speed, intervals, layer maps.

Scores are arrays [S,E] (seeds, test examples), the same examples for every arm; intervals are
bootstrap ones over both, paired in differences (jaxreason.eval.bootstrap).
"""

import collections
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from jaxreason.eval.bootstrap import difference_interval, mean_interval

AGNOSTIC = ("unified", "random", "influence")
METRICS = {"docstrings": ("rouge_l", "chrf"), "gsm_symbolic": ("exact",)}
COMPARED_ON = {"docstrings": "rouge_l", "gsm_symbolic": "exact"}

SAME_TIME = 0.02
"""Two shares of the full model's time no farther apart than this are not told apart."""


def label(arm: Mapping) -> str:
    """An arm's name, as `first_table.Arm.label` writes it."""
    rate = f"-skip{round(100 * arm['skip'])}" if arm["skip"] else ""
    return f"{arm['method']}{rate}{'' if arm['lora'] else '-plain'}"


def summary(records: Mapping[str, dict]) -> dict:
    """All numbers of the report, by task."""
    out: dict = {"tuning": tuning(records), "tasks": {}}
    scored = {n: r for n, r in records.items() if not n.startswith("tune-") and "test" in r}
    for task in METRICS:
        arms: dict[str, list[dict]] = collections.defaultdict(list)
        for record in scored.values():
            if record["task"] == task:
                arms[label(record["arm"])].append(record)
        for name, runs in arms.items():
            runs.sort(key=lambda run: run["seed"])
            check_same_examples(name, runs)
        if arms:
            check_same_examples(task, [run for runs in arms.values() for run in runs])
            out["tasks"][task] = task_summary(task, arms)
    out["between_tasks"] = between_tasks(out["tasks"])
    return out


def check_same_examples(what: str, runs: Sequence[dict]) -> None:
    """Raises ValueError where runs answered other examples, which nothing could be paired by."""
    hashes = {run["test"]["examples_sha256"] for run in runs}
    if len(hashes) > 1:
        raise ValueError(f"{what}: runs were scored on other examples; score them all again")


def tuning(records: Mapping[str, dict]) -> dict:
    """Held-out losses of the tuning runs, by task and method."""
    out: dict = collections.defaultdict(lambda: collections.defaultdict(list))
    for name, record in records.items():
        if name.startswith("tune-"):
            entry = {**record["setting"], "loss": record["loss"]}
            out[record["task"]][record["arm"]["method"]].append(entry)
    return {task: dict(methods) for task, methods in out.items()}


def scores(runs: Sequence[dict], metric: str) -> np.ndarray:
    """Scores [S,E] of an arm's runs, by rising seed."""
    return np.array([run["test"]["scores"][metric] for run in runs])


def task_summary(task: str, arms: Mapping[str, list[dict]]) -> dict:
    """Every arm of a task, FiRST against each peer, what adapters recover, and the layer maps."""
    out: dict = {"examples": len(next(iter(arms.values()))[0]["test"]["sets"]), "arms": {}}
    for name, runs in sorted(arms.items()):
        out["arms"][name] = arm_summary(task, runs)
    metric = COMPARED_ON[task]
    out["differences"] = [
        {"arm": a, "other": b, "metric": m, **difference(arms[a], arms[b], m)}
        for m in METRICS[task]
        for a, b in pairs(arms)
    ]
    out["at_equal_time"] = [
        entry
        for name in sorted(arms)
        if name.startswith("first-") and not name.endswith("-plain")
        for peer in AGNOSTIC
        if (entry := at_equal_time(arms, name, peer, metric)) is not None
    ]
    out["maps"] = {
        name: layer_map(runs) for name, runs in sorted(arms.items()) if name.startswith("first-")
    }
    return out


def pairs(arms: Mapping[str, list[dict]]) -> list[tuple[str, str]]:
    """The differences that the claim speaks of: FiRST and peers at one rate, and adapters."""
    found = []
    for name in sorted(arms):
        method, _, rest = name.partition("-")
        if method == "first":
            found += [(name, f"{peer}-{rest}") for peer in AGNOSTIC]
        if not name.endswith("-plain"):
            found += [(name, f"{name}-plain"), (name, "none")]
    return [(a, b) for a, b in found if a != b and a in arms and b in arms]


def arm_summary(task: str, runs: Sequence[dict]) -> dict:
    """One arm: scores with intervals, layers run, time a token, cost."""
    out: dict = {"arm": runs[0]["arm"], "setting": runs[0]["setting"]}
    out["seeds"] = [run["seed"] for run in runs]
    for metric in METRICS[task]:
        array = scores(runs, metric)
        out[metric] = interval(mean_interval(array)) | {"by_seed": array.mean(1).tolist()}
    out["layers"] = [
        statistics.fmean(s.count("1") for s in run["test"]["sets"]) for run in runs
    ]  # Mean over examples, by seed.
    out["finished"] = [run["test"]["means"]["finished"] for run in runs]
    for key in ("tokens", "flops", "wall_s", "loss"):
        out[key] = [run[key] for run in runs]
    timed = [run["time"] for run in runs if "time" in run]
    if len(timed) == len(runs):
        for key in ("seconds_per_token", "all_layers", "ratio"):
            out[key] = statistics.fmean(entry[key] for entry in timed)
        out["ratio_by_seed"] = [entry["ratio"] for entry in timed]
    return out


def interval(found) -> dict:
    """An interval as JSON."""
    return {"mean": found.mean, "low": found.low, "high": found.high}


def difference(runs: Sequence[dict], others: Sequence[dict], metric: str) -> dict:
    """Scores of `runs` minus `others`, over the seeds that both have, one seed standing for all."""
    a, b = paired(runs, others)
    return interval(difference_interval(scores(a, metric), scores(b, metric))) | {
        "seeds": [run["seed"] for run in a]
    }


def paired(runs: Sequence[dict], others: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """The runs of both arms with the same seeds; an arm of one run stands against all."""
    if len(runs) == 1 or len(others) == 1:
        return list(runs), list(others)
    both = {run["seed"] for run in runs} & {run["seed"] for run in others}
    return [r for r in runs if r["seed"] in both], [r for r in others if r["seed"] in both]


def at_equal_time(arms: Mapping[str, list[dict]], name: str, peer: str, metric: str) -> dict | None:
    """FiRST's score minus the peer's at FiRST's measured time a token.

    The peer's scores between two of its rates (or a rate and no skipping) are taken as a straight
    line in measured time, example by example. None where something is not timed, or FiRST is
    faster or slower than all that the peer has by more than the noise of timing (SAME_TIME).
    """
    points = [runs for n, runs in arms.items() if n == "none" or is_trained(n, peer)]
    if not all("time" in run for runs in (*points, arms[name]) for run in runs) or not points:
        return None
    points.sort(key=mean_ratio)
    here, ends = mean_ratio(arms[name]), (mean_ratio(points[0]), mean_ratio(points[-1]))
    if ends[0] - SAME_TIME <= here <= ends[1] + SAME_TIME:
        here = min(max(here, ends[0]), ends[1])
    for fast, slow in zip(points, points[1:]):
        low, high = mean_ratio(fast), mean_ratio(slow)
        if low <= here <= high and high > low:
            share = (here - low) / (high - low)
            first, a = paired(arms[name], fast)
            _, b = paired(arms[name], slow)
            if len({len(first), len(a), len(b)} - {1}) > 1:
                return None  # Not all seeds are there yet.
            mixed = (1 - share) * scores(a, metric) + share * scores(b, metric)
            found = difference_interval(scores(first, metric), mixed)
            return {"arm": name, "other": peer, "metric": metric, "ratio": here, **interval(found)}
    return None


def is_trained(name: str, method: str) -> bool:
    """Whether an arm is of the method, with adapters."""
    return name.startswith(f"{method}-skip") and not name.endswith("-plain")


def mean_ratio(runs: Sequence[dict]) -> float:
    """Time a token over that of all layers, a mean over seeds."""
    return statistics.fmean(run["time"]["ratio"] for run in runs)


def layer_map(runs: Sequence[dict]) -> dict:
    """Which layers ran: shares by layer and seed, and how much inputs differ.

    `hamming` is the mean number of layers in which two inputs' sets differ, 0 where the choice
    ignores the input; `inputs` are the first seed's sets of 40 examples.
    """
    sets = [np.array([[int(c) for c in row] for row in r["test"]["sets"]]) for r in runs]
    share = [found.mean(0) for found in sets]
    # Two inputs drawn without replacement differ in layer l with 2 k (n - k) / (n (n - 1)).
    apart = []
    for found in sets:
        n, k = len(found), found.sum(0)
        apart.append(float(np.sum(2 * k * (n - k)) / (n * (n - 1))) if n > 1 else 0.0)
    return {
        "share": [np.round(row, 4).tolist() for row in share],
        "distinct_sets": [len(set(run["test"]["sets"])) for run in runs],
        "hamming": apart,
        "inputs": runs[0]["test"]["sets"][:40],
    }


def between_tasks(tasks: Mapping[str, dict]) -> dict:
    """How far two tasks' mean keep shares are apart, in layers, beside seeds of one task.

    The sum over layers of |share - share'|: of two tasks (same seed), and of two seeds (same task).
    Only where tasks differ more than seeds do has the task a map of its own.
    """
    out: dict = {}
    if len(tasks) < 2:
        return out
    (_, a), (_, b) = tasks.items()
    for name in sorted(set(a["maps"]) & set(b["maps"])):
        x, y = np.array(a["maps"][name]["share"]), np.array(b["maps"][name]["share"])
        n = min(len(x), len(y))
        seeds = [
            float(np.abs(m[i] - m[j]).sum())
            for m in (x, y)
            for i in range(len(m))
            for j in range(i + 1, len(m))
        ]
        out[name] = {
            "tasks": float(np.abs(x[:n] - y[:n]).sum(1).mean()),
            "seeds": statistics.fmean(seeds) if seeds else None,
        }
    return out
