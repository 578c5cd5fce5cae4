"""What a token costs by the number of layers that it runs: `t = a + b * kept`, on this machine.

    python -m benchmarks.skip_speed --out=docs/results/skip_speed.json
    python -m benchmarks.skip_speed --model=models/smollm2 --dtypes=float32
    python -m benchmarks.skip_speed --preset=tiny_1m --prompt=16 --new=16 --out=

Through `generate`, as a user has it: random weights of SmolLM2-135M's shape (or those of a folder),
64 tokens of prompt and 64 new ones, rows that share one set of evenly spread layers, six sizes of
it. In each of five rounds every size is timed in turn. What conditionals and routers that keep all
layers cost over the program without either is less than a machine's noise. So there they take turns
every four tokens (`benchmarks.turns`), in several requests of 128 tokens, between two runs of the
plain program; and it passes where the whole interval of the routers' cost is below 2 %. Rows of
different sets are reported apart, as a union and grouped. Compiling is not in the times. Run it
alone.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import turns
from benchmarks.generate_speed import commit_of
from jaxreason.core import platform

LEVELS = 6
TURN = 4  # Tokens between two turns where conditionals and routers are timed.
CHUNKS = 32  # Turns of a request there.
# What the project promises of times with a shared set.
LEAST_R2, MOST_OFF, MOST_ROUTER = 0.99, 0.05, 0.02


def spread(num_layers: int, kept: int) -> tuple[bool, ...]:
    """`kept` of L layers, as evenly spread as can be."""
    chosen = {int(x) for x in (np.arange(kept) + 0.5) * num_layers / max(kept, 1)}
    return tuple(layer in chosen for layer in range(num_layers))


def fit(kept: Sequence[int], ms: Sequence[float]) -> dict[str, Any]:
    """The line through the points by least squares, and how well it holds.

    `off`: by how much b * L differs from t(all) - t(0), as a fraction of the latter.
    """
    x, y = np.asarray(kept, float), np.asarray(ms, float)
    b, a = np.polyfit(x, y, 1)
    residual = y - a - b * x
    r2 = 1 - float((residual**2).sum() / ((y - y.mean()) ** 2).sum())
    measured = float(y[-1] - y[0])
    off = float(b * x[-1] / measured - 1)
    return {
        "a_ms": float(a), "b_ms": float(b), "r2": r2, "b_times_layers_ms": float(b * x[-1]),
        "all_minus_none_ms": measured, "off": off,
        "passes": bool(r2 >= LEAST_R2 and abs(off) <= MOST_OFF),
    }  # fmt: skip


def costs_of(
    read: dict[str, Sequence[float]], chunks: dict[str, Sequence[float]], steps: int
) -> dict[str, Any]:
    """What `routers` cost over the mean of `plain` and `again`, which are one program run twice.

    `read`: seconds of a prompt's reading; `chunks`: of TURN steps of the token loop; each way's
    lists go together. A step's cost is that of the conditionals, which are all that routers leave
    in the token loop. The whole is one prompt and `steps` steps, put together of these. The two
    plain runs against each other are the control: where it is not zero, that is error.
    """

    def plain(times: dict[str, Sequence[float]]) -> np.ndarray:
        return np.mean([times["plain"], times["again"]], axis=0)

    of_prompt = turns.ratios(read["routers"], plain(read))
    of_step = turns.ratios(chunks["routers"], plain(chunks))
    whole = [np.median(plain(read)), np.median(plain(chunks)) * steps / TURN]
    return {
        "prefill_ms": {n: 1e3 * statistics.median(v) for n, v in read.items()},
        "turns_ms_a_step": {n: 1e3 * statistics.median(v) / TURN for n, v in chunks.items()},
        "control_a_step": turns.cost([1], [turns.ratios(chunks["again"], chunks["plain"])]),
        "control_of_the_prompt": turns.cost([1], [turns.ratios(read["again"], read["plain"])]),
        "routers_cost_a_step": turns.cost([1], [of_step]),
        "routers_cost_of_the_prompt": turns.cost([1], [of_prompt]),
        "routers_cost_of_the_whole": turns.cost(whole, [of_prompt, of_step]),
        "turns": {
            "prefill_ms": {n: [round(1e3 * x, 3) for x in v] for n, v in read.items()},
            "decode_ms_a_step": {
                n: [round(1e3 * x / TURN, 3) for x in v] for n, v in chunks.items()
            },
        },
    }  # fmt: skip


def passes(line: dict[str, Any], programs: int, routers: dict[str, Any]) -> bool:
    """Whether the line, the number of programs and the routers' cost are as promised."""
    return line["passes"] and programs == 1 and routers["interval"][1] < MOST_ROUTER


def load(args, dtype: str):
    """The model to be timed: of a folder, or random of a preset's shape."""
    if args.model:
        from jaxreason.recipes.open_model import open_model

        return open_model(args.model, dtype=dtype)
    import jax

    from jaxreason.core import params as P
    from jaxreason.models import decoder
    from jaxreason.models.model import Model
    from jaxreason.models.presets import PRESETS

    cfg = PRESETS[args.preset]
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 8192)  # Ours take the tokenizer's.
    params = P.initialise(decoder.specs(cfg), jax.random.key(0))
    return Model(params=params, config=cfg, dtype=dtype, name=args.preset)


class Bench:
    """One model in one precision, with prompts for a batch size."""

    def __init__(self, args, model: Any, batch: int):
        from jaxreason.depth.decision import Decision, Skipper, static_routers
        from jaxreason.rollout import prepare

        self.args, self.batch = args, batch
        self.layers = model.config.num_layers
        self.model = prepare(model, batch)
        routers = static_routers((True,) * self.layers, model.config.d_model)
        skipper = Skipper(routers, "decode_only", Decision(always_keep=()))
        self.routed = dataclasses.replace(self.model, depth=skipper)
        vocab = model.config.vocab_size
        self.prompts = np.random.default_rng(batch).integers(3, vocab, (4 * batch, args.prompt))

    def call(self, model: Any, keeps: Sequence[Any], new: int = 0, **how: Any) -> Any:
        """One request for each set of layers in `keeps` (None: as the model says); the stats."""
        from jaxreason.rollout import GREEDY, Request, Stats, run

        stats = how.pop("stats", None) or Stats()
        requests = [
            Request(
                tokens=tuple(self.prompts[i].tolist()), prompt_index=i, sampling=GREEDY, keep=keep,
                max_new_tokens=new or self.args.new, ignore_eos=True,
            )
            for i, keep in enumerate(keeps)
        ]  # fmt: skip
        run(model, requests, slots=self.batch, stats=stats, **how)
        return stats

    def in_turn(self, arms: dict[Any, Callable[[], Any]], rounds: int = 0) -> dict[Any, list[Any]]:
        """Every arm once a round, in alternating order, after two calls to compile and warm up."""
        for arm in arms.values():
            arm(), arm()
        found: dict[Any, list[Any]] = {name: [] for name in arms}
        for i in range(rounds or self.args.rounds):
            for name in list(arms)[:: 1 if i % 2 == 0 else -1]:
                found[name].append(arms[name]())
        return found

    def shared(self) -> dict[str, Any]:
        """Rows that share a set, by its size; then what conditionals and routers cost."""
        from jaxreason.rollout import slots as device

        kept = [round(self.layers * i / (LEVELS - 1)) for i in range(LEVELS)]
        rows, steps = self.batch, self.args.new - 1
        arms: dict[Any, Callable[[], Any]] = {
            k: lambda k=k: self.call(self.model, [spread(self.layers, k)] * rows) for k in kept
        }
        before = device.decode._cache_size()
        found = self.in_turn(arms)
        self.call(self.routed, [None] * rows)  # By the same program.
        programs = device.decode._cache_size() - before
        for k in kept:
            assert all(s.layers.computed == k * steps and s.layers.steps == steps for s in found[k])
        decode = {
            n: [1e3 * s.decode_seconds / steps for s in rounds] for n, rounds in found.items()
        }
        middle = {name: statistics.median(values) for name, values in decode.items()}
        line, costs = fit(kept, [middle[k] for k in kept]), self.costs()
        return {
            "kept": kept, "ms_a_step": {str(k): middle[k] for k in kept},
            "ms_a_token": {str(k): middle[k] / rows for k in kept}, "fit": line,
            "decode_programs_for_all_sets": programs, **costs,
            "passes": passes(line, programs, costs["routers_cost_of_the_whole"]),
            "rounds": {"decode_ms_a_step": {str(n): v for n, v in decode.items()}},
        }  # fmt: skip

    def costs(self) -> dict[str, Any]:
        """What routers that keep all layers cost over the program without any conditional.

        They read the prompt; in the token loop only the conditionals are left of them.
        """
        rows, new = self.batch, 1 + CHUNKS * TURN
        ways = {
            "plain": (self.model, [None] * rows),
            "routers": (self.routed, [None] * rows),
            "again": (self.model, [None] * rows),
        }

        def way(model: Any, keeps: Sequence[Any]) -> turns.Way:
            return lambda cancel, stats: self.call(
                model, keeps, new, chunk=TURN, cancel=cancel, stats=stats
            )

        named = [(name, way(*what)) for name, what in ways.items()]
        chunks: dict[str, list[float]] = {name: [] for name in ways}
        turns.decode_seconds(dict(named))  # Compiles.
        for i in range(self.args.requests):
            order = named[:: -1 if i % 2 else 1]
            for name, seconds in turns.decode_seconds(dict(order)).items():
                if len(seconds) != CHUNKS:
                    raise RuntimeError(f"{name}: {len(seconds)} chunks were timed, not {CHUNKS}")
                chunks[name] += seconds[1:]  # The first comes right behind the prompt.
        prompts = self.in_turn(
            {n: lambda what=what: self.call(*what, new=1) for n, what in ways.items()},
            rounds=3 * self.args.requests,
        )
        read = {n: [s.prefill_seconds for s in found] for n, found in prompts.items()}
        return costs_of(read, chunks, self.args.new - 1)

    def mixed(self) -> dict[str, Any]:
        """Four times as many requests as slots, with 60 % of the layers in sets of their own."""
        rng, size = np.random.default_rng(5), round(0.6 * self.layers)

        def draw() -> tuple[bool, ...]:
            chosen = set(rng.choice(self.layers, size, replace=False).tolist())
            return tuple(layer in chosen for layer in range(self.layers))

        n, result = 4 * self.batch, {}
        for sets in sorted({1, 2, 4, n}):
            drawn = [draw() for _ in range(sets)]
            keeps = [drawn[i % sets] for i in range(n)]
            arms = {
                how: lambda how=how, keeps=keeps: self.call(self.model, keeps, batching=how)
                for how in ("union", "group")
            }
            result[str(sets)] = {
                how: {
                    "ms_a_token": statistics.median(
                        1e3 * s.decode_seconds / s.decode_tokens for s in rounds
                    ),
                    "computed_a_step": rounds[0].layers.computed_per_step,
                    "kept_a_token": rounds[0].layers.kept_per_token,
                    "steps": rounds[0].layers.steps,
                }
                for how, rounds in self.in_turn(arms).items()
            }
        return result


def show(name: str, found: dict[str, Any]) -> None:
    """Prints a batch size's table."""
    line = found["fit"]
    print(f"\n{name}: kept, ms a step, ms a token")
    for k in found["kept"]:
        print(f"{k:6d} {found['ms_a_step'][str(k)]:10.3f} {found['ms_a_token'][str(k)]:10.3f}")
    print(
        f"t = {line['a_ms']:.3f} + {line['b_ms']:.4f} kept ms, R2 {line['r2']:.4f}, b L is "
        f"{line['off']:+.1%} off t(all) - t(0); {found['decode_programs_for_all_sets']} program"
    )
    for what in (
        "control_a_step", "control_of_the_prompt", "routers_cost_a_step",
        "routers_cost_of_the_prompt", "routers_cost_of_the_whole",
    ):  # fmt: skip
        cost = found[what]
        low, high = cost["interval"]
        print(f"{what.replace('_', ' ')}: {cost['median']:+.2%} ({low:+.2%} to {high:+.2%})")
    print(f"passes: {found['passes']}")
    for sets, ways in found.get("mixed", {}).items():
        parts = [
            f"{how} {way['ms_a_token']:.3f} ms a token ({way['computed_a_step']:.1f} layers a step)"
            for how, way in ways.items()
        ]
        print(f"{sets:>4} sets: {', '.join(parts)}")


def main() -> None:
    """Prints tables and, with --out, writes every measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="a model's folder; else random weights")
    parser.add_argument("--preset", default="smollm2_135m", help="shape of the random weights")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16, help="those that take turns")
    parser.add_argument(
        "--mixed", action=argparse.BooleanOptionalAction, default=True,
        help="whether to time rows of different sets, which takes longest",
    )  # fmt: skip
    parser.add_argument("--out", default="", help="where to write the measurements as JSON")
    args = parser.parse_args()
    platform.prepare(restart=True, onednn=False)  # As `jaxreason.generate` does.
    platform.compilation_cache()
    load_at_start, found = os.getloadavg()[0], {}
    for dtype in args.dtypes.split(","):
        model = load(args, dtype)
        found[dtype] = {}
        for batch in map(int, args.batches.split(",")):
            bench = Bench(args, model, batch)
            found[dtype][str(batch)] = bench.shared()
            if batch > 1 and args.mixed:
                found[dtype][str(batch)]["mixed"] = bench.mixed()
            show(f"{dtype}, batch {batch}", found[dtype][str(batch)])
            sys.stdout.flush()
            if args.out:
                write(args, found, load_at_start)


def cpu(cpuinfo: str = "/proc/cpuinfo") -> dict[str, Any]:
    """The processor's name and what it has for bfloat16; empty where that cannot be read."""
    path = pathlib.Path(cpuinfo)
    if not path.exists():
        return {}
    fields = dict(
        map(str.strip, x.split(":", 1)) for x in path.read_text().splitlines() if ":" in x
    )
    has = {"amx_bf16", "avx512_bf16"} & set(fields.get("flags", "").split())
    return {"name": fields.get("model name", ""), "bfloat16": sorted(has)}


def write(args, found: dict[str, Any], load_at_start: float) -> None:
    """Writes what has been measured so far: a run that is cut short keeps it."""
    import jax
    import jaxlib

    result = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("model", "out")},
        "weights": pathlib.Path(args.model).name if args.model else "random",
        "versions": {
            "python": sys.version.split()[0], "jax": jax.__version__,
            "jaxlib": jaxlib.__version__, "numpy": np.__version__,
        },
        "device": jax.devices()[0].device_kind,
        "cpu": cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "commit": commit_of(),
        "load_at_start": load_at_start,
        "load_at_end": os.getloadavg()[0],
        "dtypes": found,
    }  # fmt: skip
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
