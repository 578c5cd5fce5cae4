"""What is to be gained by choosing layers by input: per token, of SmolLM2-135M-Instruct as it is.

    python -m benchmarks.choice_by_input --stage=measure   # half an hour on a CPU core with AMX
    python -m benchmarks.choice_by_input --stage=sum       # docs/results/choice_by_input.json

Prompts are read by all layers, as FiRST does it; of their completions each token's loss is measured
without each layer alone, and under a pool of sets of 24 layers, which leave out six of the twelve
that are cheapest alone. Then, by cross-validation over examples or over the tokens of each:

    common       the set that is best for other examples, for all
    own tokens   for each example the set that the other half of its tokens asks for: what a choice
                 by input could gain if it knew the completion; seen through as many tokens
    its prompt   the set that a ridge regression expects to be best from what routers see: the
                 prompt's mean normalised stream before each layer
    hindsight    the best set for the very tokens that are scored: a bound that noise alone reaches

Nothing is trained but the regression.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxreason.core import platform

OUT = pathlib.Path("docs/results/choice_by_input.json")
RAW = pathlib.Path("runs/choice_by_input")
MODEL = "models/smollm2"
TASKS = {"docstrings": (384, 32), "gsm_symbolic": (256, 64)}
"""Examples of the training part, and the most tokens of a completion that are scored."""
ROWS, CAPACITIES, LEAST = 16, (256, 576), 8
POOL, SKIPPED, FROM = 32, 6, 12
FOLDS, DRAWS = 8, 2000
RIDGES = (1e1, 1e2, 1e3, 1e4, 1e5)


def pool_of(costs: np.ndarray, others: list[np.ndarray], seed: int = 0) -> np.ndarray:
    """Sets [K,L] bool: the six cheapest by each of the tasks' costs, then ones drawn."""
    number = len(costs)

    def without(layers) -> tuple[bool, ...]:
        return tuple(layer not in layers for layer in range(number))

    def cheapest(costs: np.ndarray, count: int) -> np.ndarray:
        inner = np.arange(1, number - 1)  # The first and the last always run.
        return inner[np.argsort(costs[1:-1], kind="stable")[:count]]

    sets = {without(cheapest(c, SKIPPED)): None for c in (costs, *others)}
    rng, some = np.random.default_rng(seed), cheapest(costs, FROM)
    while len(sets) < POOL:
        sets[without(rng.choice(some, SKIPPED, replace=False))] = None
    return np.array(list(sets))


class Meter:
    """The model, and a task's examples in batches of equal shape."""

    def __init__(self, task: str):
        from jaxreason.data.pairs_config import PairsConfig
        from jaxreason.data.tasks import Docstrings, GsmSymbolic
        from jaxreason.recipes.encode_examples import make_encode
        from jaxreason.recipes.open_model import open_model

        source = {"docstrings": Docstrings(), "gsm_symbolic": GsmSymbolic()}[task]
        self.count, self.tokens = TASKS[task]
        self.model = open_model(MODEL, dtype="bfloat16")
        encode = make_encode(self.model, PairsConfig(source=source, chat=True))
        found = source.examples
        self.names, self.examples = [], []
        for at in np.random.default_rng(0).permutation(len(found)):
            encoded = encode(found[int(at)])
            begin = list(encoded.learned).index(True)
            prompt, completion = encoded.tokens[:begin], encoded.tokens[begin:][: self.tokens + 1]
            if len(completion) > LEAST and len(prompt) + self.tokens <= CAPACITIES[-1]:
                self.names.append(found[int(at)].name)
                self.examples.append((list(prompt), list(completion)))
            if len(self.examples) == self.count:
                break

    def batches(self) -> Iterator[tuple[list[int], int, dict[str, np.ndarray]]]:
        """Examples of similar length: which, the cache's capacity, and their tokens."""
        order = sorted(range(len(self.examples)), key=lambda i: len(self.examples[i][0]))
        for start in range(0, len(order), ROWS):
            which = order[start : start + ROWS]
            rows = [self.examples[i] for i in which]
            longest = max(len(prompt) for prompt, _ in rows)
            capacity = next(c for c in CAPACITIES if longest + self.tokens <= c)
            arrays = {
                "prompt": np.zeros((ROWS, capacity - self.tokens), np.int32),
                "prompt_length": np.ones(ROWS, np.int32),
                "completion": np.zeros((ROWS, self.tokens + 1), np.int32),
                "length": np.zeros(ROWS, np.int32),
            }
            for row, (prompt, completion) in enumerate(rows):
                arrays["prompt"][row, : len(prompt)] = prompt
                arrays["prompt_length"][row] = len(prompt)
                arrays["completion"][row, : len(completion)] = completion
                arrays["length"][row] = len(completion) - 1
            yield which, capacity, arrays

    def measure(self, sets: np.ndarray, features: bool) -> dict[str, np.ndarray]:
        """Losses [N,K,T] of a completion's tokens after the first, `valid` [N,T], and with
        `features` what routers see [N,L,D]."""
        import functools

        import jax
        import jax.numpy as jnp

        from jaxreason.depth.decision import keep_wrap
        from jaxreason.models import decoder

        cfg, dtype = self.model.config, jnp.bfloat16
        params = jax.jit(lambda p: jax.tree.map(lambda x: x.astype(dtype), decoder.unstack(p)))(
            self.model.params
        )

        def inputs(tokens, begin, counts):
            steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            segments = (steps < counts[:, None]).astype(jnp.int32)
            return {"tokens": tokens, "positions": begin[:, None] + steps, "segment_ids": segments}

        @functools.partial(jax.jit, static_argnames="capacity")
        def read(params, tokens, counts, capacity):
            batch = inputs(tokens, jnp.zeros_like(counts), counts)
            out = decoder.forward(
                params, cfg, batch, dtype=dtype, capture=tuple(range(cfg.num_layers)),
                cache=decoder.init_cache(cfg, ROWS, capacity, dtype), cache_is_empty=True,
            )  # fmt: skip
            seen = []
            for layer in range(cfg.num_layers):
                h = out.captured[layer].astype(jnp.float32)
                h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)
                h = jnp.where(batch["segment_ids"][..., None] > 0, h, 0.0)
                seen.append(jnp.sum(h, axis=1) / counts[:, None])
            return out.cache.truncate(counts), jnp.stack(seen, axis=1)

        @jax.jit
        def losses(params, cache, tokens, counts, keep):
            batch = inputs(tokens[:, :-1], cache.lengths, counts)
            wrap = keep_wrap(jnp.broadcast_to(keep[None], (ROWS, cfg.num_layers)))
            out = decoder.forward(params, cfg, batch, dtype=dtype, cache=cache, wrap=wrap)
            logits = decoder.logits(out).astype(jnp.float32)
            own = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0]
            return jax.nn.logsumexp(logits, axis=-1) - own

        count, time = len(self.examples), self.tokens
        result = {
            "loss": np.zeros((count, len(sets), time), np.float32),
            "valid": np.zeros((count, time), bool),
        }
        if features:
            result["seen"] = np.zeros((count, cfg.num_layers, cfg.d_model), np.float32)
        for which, capacity, rows in self.batches():
            n, length = len(which), rows["length"]
            cache, seen = read(params, rows["prompt"], rows["prompt_length"], capacity)
            result["valid"][which] = (np.arange(time)[None] < length[:, None])[:n]
            if features:
                result["seen"][which] = np.asarray(seen)[:n]
            for k, keep in enumerate(sets):
                found = losses(params, cache, rows["completion"], length, jnp.asarray(keep))
                result["loss"][which, k] = np.asarray(found)[:n]
            print(f"{which[0]}: {n} rows, capacity {capacity}", flush=True)
        return result


def measure(tasks: list[str]) -> None:
    """Measures what is not measured yet, into RAW."""
    platform.prepare(restart=True)
    RAW.mkdir(parents=True, exist_ok=True)

    def save(name: str, **arrays: Any) -> None:
        new = RAW / f".{name}.npz"
        np.savez_compressed(new, **arrays)
        os.replace(new, RAW / f"{name}.npz")

    meters: dict[str, Meter] = {}

    def meter(task: str) -> Meter:
        return meters.setdefault(task, Meter(task))

    for task in tasks:
        if not (RAW / f"{task}-alone.npz").exists():
            number = meter(task).model.config.num_layers
            found = meter(task).measure(
                np.concatenate([[np.ones(number, bool)], ~np.eye(number, dtype=bool)]), True
            )
            save(f"{task}-alone", names=np.array(meter(task).names), **found)
    costs = {task: costs_alone(np.load(RAW / f"{task}-alone.npz")) for task in tasks}
    for task in tasks:
        if not (RAW / f"{task}-pool.npz").exists():
            others = [costs[other] for other in tasks if other != task]
            sets = pool_of(costs[task], others)
            save(f"{task}-pool", sets=sets, **meter(task).measure(sets, False))


def costs_alone(raw) -> np.ndarray:
    """What leaving each layer out costs a token [L], in nats."""
    return _mean(raw["loss"][:, 1:] - raw["loss"][:, :1], raw["valid"])


def _mean(loss_nkt: np.ndarray, valid_nt: np.ndarray) -> np.ndarray:
    """The mean over all valid tokens [K]."""
    valid = valid_nt[:, None].astype(np.float64)
    return (loss_nkt * valid).sum(axis=(0, 2)) / valid.sum()


def halves(valid_nt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The valid tokens of even and of odd number."""
    even = np.arange(valid_nt.shape[1])[None] % 2 == 0
    return valid_nt & even, valid_nt & ~even


def by_example(loss_nkt: np.ndarray, valid_nt: np.ndarray) -> np.ndarray:
    """The mean over each example's valid tokens [N,K]."""
    valid = valid_nt[:, None].astype(np.float64)
    return (loss_nkt * valid).sum(axis=2) / valid.sum(axis=2)


def reliability(loss_nkt: np.ndarray, valid_nt: np.ndarray) -> dict[str, float]:
    """How far examples differ in what a set costs them beyond what it costs all, and how much of
    that half of the tokens tells of the other half."""
    parts = [by_example(loss_nkt, part) for part in halves(valid_nt)]
    parts = [part - part.mean(axis=1, keepdims=True) for part in parts]  # An easy text is easy.
    parts = [part - part.mean(axis=0) for part in parts]
    r = float(np.corrcoef(parts[0].ravel(), parts[1].ravel())[0, 1])
    whole = by_example(loss_nkt, valid_nt)
    whole = whole - whole.mean(axis=1, keepdims=True)
    return {
        "sd_between_sets": round(float(whole.mean(axis=0).std()), 4),
        "sd_between_examples": round(float((whole - whole.mean(axis=0)).std()), 4),
        "correlation_of_halves": round(r, 3),
        "of_whole_examples": round(2 * r / (1 + r), 3) if r > -1 else r,
        "slope_of_halves": round(float((parts[0] * parts[1]).sum() / (parts[0] ** 2).sum()), 3),
    }


def ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray, strength: float) -> np.ndarray:
    """Predictions for `new` [M,F] of a ridge regression of y [N,K] on x [N,F], both centred."""
    middle, mean = x.mean(axis=0), y.mean(axis=0)
    x, new = x - middle, new - middle
    dual = np.linalg.solve(x @ x.T + strength * np.eye(len(x)), y - mean)
    return mean + (new @ x.T) @ dual


def choices(loss_nkt, valid_nt, seen_nf, seed: int = 0) -> dict[str, Any]:
    """Loss a token of each way to choose, with intervals of its gain over the common set."""
    rng = np.random.default_rng(seed)
    count = len(loss_nkt)
    folds = rng.permutation(count) % FOLDS
    total = (loss_nkt * valid_nt[:, None]).sum(axis=2, dtype=np.float64)  # [N,K]
    tokens = valid_nt.sum(axis=1).astype(np.float64)
    means = total / tokens[:, None]
    deviation = means - means.mean(axis=1, keepdims=True)
    x = (seen_nf - seen_nf.mean(axis=0)) / (seen_nf.std(axis=0) + 1e-6) / seen_nf.shape[1] ** 0.5
    sums = {name: np.zeros(count) for name in ("common", "own tokens", "its prompt", "hindsight")}
    explained, variance = 0.0, 0.0
    parts = halves(valid_nt)
    half = [(loss_nkt * part[:, None]).sum(axis=2, dtype=np.float64) for part in parts]
    for fold in range(FOLDS):
        rest, here = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        common = total[rest].sum(axis=0) / tokens[rest].sum()
        sums["common"][here] = total[here][:, np.argmin(common)]
        sums["hindsight"][here] = total[here].min(axis=1)
        # What one half's deviation says of the other's is learned from the other examples.
        for a, b in ((0, 1), (1, 0)):
            now, then = (half[i] / parts[i].sum(axis=1)[:, None] for i in (a, b))
            now, then = (v - v.mean(axis=1, keepdims=True) for v in (now, then))
            middle = now[rest].mean(axis=0), then[rest].mean(axis=0)
            one, two = now[rest] - middle[0], then[rest] - middle[1]
            slope = max((one * two).sum() / (one**2).sum(), 0.0)
            expected = common - common.mean() + slope * (now[here] - middle[0])
            sums["own tokens"][here] += half[b][here, np.argmin(expected, axis=1)]
        # The strength is chosen within the other examples.
        inner = rng.permutation(len(rest)) % 4
        errors = []
        for strength in RIDGES:
            guess = np.zeros((len(rest), loss_nkt.shape[1]))
            for i in range(4):
                a, b = rest[inner != i], inner == i
                guess[b] = ridge(x[a], deviation[a], x[rest[b]], strength)
            errors.append(((guess - deviation[rest]) ** 2).sum())
        expected = ridge(x[rest], deviation[rest], x[here], RIDGES[int(np.argmin(errors))])
        middle = deviation[rest].mean(axis=0)
        explained += ((deviation[here] - expected) ** 2).sum()
        variance += ((deviation[here] - middle) ** 2).sum()
        by_prompt = common - common.mean() + expected - middle
        sums["its prompt"][here] = total[here, np.argmin(by_prompt, axis=1)]
    draws = rng.integers(0, count, (DRAWS, count))
    result: dict[str, Any] = {}
    for name, loss in sums.items():
        gain = sums["common"] - loss
        drawn = gain[draws].sum(axis=1) / tokens[draws].sum(axis=1)
        low, high = np.percentile(drawn, (2.5, 97.5))
        result[name] = {
            "loss": round(float(loss.sum() / tokens.sum()), 4),
            "gain": round(float(gain.sum() / tokens.sum()), 4),
            "interval": [round(float(low), 4), round(float(high), 4)],
        }
    result["variance_explained_by_prompt"] = round(float(1 - explained / variance), 4)
    return result


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation; no two values are equal."""
    places = [np.argsort(np.argsort(values)) for values in (a, b)]
    return round(float(np.corrcoef(*places)[0, 1]), 3)


def sum_up(tasks: list[str]) -> None:
    """Writes OUT from what was measured."""
    raw = {t: (np.load(RAW / f"{t}-alone.npz"), np.load(RAW / f"{t}-pool.npz")) for t in tasks}
    costs = {task: costs_alone(alone) for task, (alone, _) in raw.items()}
    result: dict[str, Any] = {
        "model": MODEL, "skipped": SKIPPED, "pool": POOL, "tasks": {},
        "costs_of_layers_alone": {t: [round(float(c), 4) for c in costs[t]] for t in tasks},
    }  # fmt: skip
    if len(tasks) == 2:
        inner = [costs[task][1:-1] for task in tasks]
        result["spearman_between_tasks"] = spearman(*inner)
    for task, (alone, pool) in raw.items():
        assert np.array_equal(alone["valid"], pool["valid"])
        losses, valid, sets = pool["loss"], pool["valid"], pool["sets"]
        seen = alone["seen"].reshape(len(losses), -1)
        common = _mean(losses, valid)
        result["tasks"][task] = {
            "examples": len(losses),
            "tokens": int(valid.sum()),
            "all_layers": round(float(_mean(alone["loss"][:, :1], valid)[0]), 4),
            "pool": {"best": round(float(common.min()), 4), "mean": round(float(common.mean()), 4)},
            "cheapest_by_task": {
                name: round(float(common[i]), 4)
                for i, name in enumerate([task, *(t for t in tasks if t != task)])
            },
            "skipped_by_best": np.flatnonzero(~sets[np.argmin(common)]).tolist(),
            "single_layers": reliability(alone["loss"][:, 2:-1] - alone["loss"][:, :1], valid),
            "sets": reliability(losses, valid),
            "choice": choices(losses, valid, seen),
        }
        print(task, json.dumps(result["tasks"][task], indent=1))
    new = OUT.with_suffix(".new")
    new.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(new, OUT)


def main() -> None:
    """Runs a stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=["measure", "sum"], required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    args = parser.parse_args()
    tasks = args.tasks.split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"--tasks: {unknown[0]!r}; expected some of {', '.join(TASKS)}")
    (measure if args.stage == "measure" else sum_up)(tasks)


if __name__ == "__main__":
    main()
