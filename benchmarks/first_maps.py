"""Which layers FiRST ran, and how far its choices are apart: between inputs, tasks and seeds."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np


def layer_map(runs: Sequence[Mapping]) -> dict:
    """Which layers ran: shares by layer and seed, and how much inputs differ.

    `hamming` is the mean number of layers in which two inputs' sets differ (mean pairwise Hamming
    distance), 0 where the choice ignores the input; `varies` the share of layers that some inputs
    run and others skip; both by seed. `inputs` are the first seed's sets of 40 examples.
    """
    sets = [np.array([[int(c) for c in row] for row in r["test"]["sets"]]) for r in runs]
    share = [found.mean(0) for found in sets]
    # Two inputs drawn without replacement differ in layer l with 2 k (n - k) / (n (n - 1)).
    apart = []
    for found in sets:
        n, k = len(found), found.sum(0)
        apart.append(float(np.sum(2 * k * (n - k)) / (n * (n - 1))) if n > 1 else 0.0)
    return {
        "seeds": [run["seed"] for run in runs],
        "share": [np.round(row, 4).tolist() for row in share],
        "distinct_sets": [len(set(run["test"]["sets"])) for run in runs],
        "hamming": apart,
        "varies": [float(np.mean((row > 0) & (row < 1))) for row in share],
        "inputs": runs[0]["test"]["sets"][:40],
    }


def between_tasks(tasks: Mapping[str, Mapping]) -> dict:
    """How far two tasks' mean keep shares are apart, in layers, beside seeds of one task.

    The sum over layers of |share - share'|: of two tasks (same seed), and of two seeds (same task).
    Only where tasks differ more than seeds do has the task a map of its own.
    """
    out: dict = {}
    if len(tasks) < 2:
        return out
    (_, a), (_, b) = tasks.items()
    for name in sorted(set(a["maps"]) & set(b["maps"])):
        x, y = (by_seed(task["maps"][name]) for task in (a, b))
        both = sorted(set(x) & set(y))
        seeds = [float(np.abs(m[i] - m[j]).sum()) for m in (x, y) for i in m for j in m if i < j]
        out[name] = {
            "tasks": float(np.mean([np.abs(x[s] - y[s]).sum() for s in both])) if both else None,
            "seeds": statistics.fmean(seeds) if seeds else None,
        }
    return out


def by_seed(entry: Mapping) -> dict[int, np.ndarray]:
    """A map's keep shares [L] by seed."""
    return {seed: np.array(row) for seed, row in zip(entry["seeds"], entry["share"], strict=True)}
