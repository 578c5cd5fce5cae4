"""What one way to generate costs over another, where the machine is less steady than that.

Ways take turns after every few tokens, so that what disturbs the machine for longer meets them all,
and the cost is the median of the ratios of neighbours. Intervals are percentiles over resampled
ratios (bootstrap).
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000

# Takes a `cancel` for `rollout.run`, and `stats`; generates.
Way = Callable[[Callable[[], bool], Any], None]


def decode_seconds(ways: dict[str, Way]) -> dict[str, list[float]]:
    """Seconds of every chunk of tokens of each way; they run together, one at work at a time.

    The engine asks `cancel` before each chunk: there a way hands the turn on, in the order of
    `ways`, and waits for its own. The ways should have as many chunks as each other. An error in
    one ends all and is raised.
    """
    from jaxreason.rollout import Stats

    names, condition = list(ways), threading.Condition()
    left, turn = list(names), [names[0]]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    errors: list[BaseException] = []

    def hand_on(name: str, ended: bool) -> None:
        place = left.index(name)
        if ended:
            left.remove(name)
        if left:
            turn[0] = left[(place + (not ended)) % len(left)]
        condition.notify_all()

    def work(name: str) -> None:
        stats, before = Stats(), [0.0]

        def note() -> None:
            if stats.decode_seconds > before[0]:
                seconds[name].append(stats.decode_seconds - before[0])
                before[0] = stats.decode_seconds

        def cancel() -> bool:
            note()
            with condition:
                hand_on(name, ended=False)
                condition.wait_for(lambda: turn[0] == name or errors)
            return bool(errors)

        try:
            with condition:
                condition.wait_for(lambda: turn[0] == name or errors)
            if not errors:
                ways[name](cancel, stats)
                note()
        except BaseException as e:  # Whatever it is, the others wait for a turn that never comes.
            errors.append(e)
        finally:
            with condition:
                hand_on(name, ended=True)

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return seconds


def ratios(over: Sequence[float], under: Sequence[float]) -> np.ndarray:
    """Each of `over` divided by its neighbour in `under`."""
    if len(over) != len(under) or not len(over):
        raise ValueError(f"{len(over)} and {len(under)} times; expected as many, and some")
    return np.asarray(over) / np.asarray(under)


def cost(weights: Sequence[float], pairs: Sequence[np.ndarray]) -> dict[str, Any]:
    """By how much a whole of several parts costs more, each part with ratios of its own.

    `weights`: the parts' times without what costs. Returns the `median` (of each part's ratios,
    weighed) and the 95 % `interval`, both as fractions of the whole, and the `pairs` of each part.
    """
    share = np.asarray(weights, float) / np.sum(weights)
    rng = np.random.default_rng(0)
    drawn = [
        np.median(rng.choice(part, (RESAMPLES, len(part))), axis=1)
        for part in map(np.asarray, pairs)
    ]
    low, high = np.percentile(share @ np.stack(drawn) - 1, [2.5, 97.5])
    middle = share @ np.asarray([np.median(part) for part in pairs]) - 1
    return {
        "median": float(middle), "interval": [float(low), float(high)],
        "pairs": [len(part) for part in pairs],
    }  # fmt: skip
