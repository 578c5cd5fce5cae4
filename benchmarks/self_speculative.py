"""Tokens a second of self-speculative decoding against plain decoding, on this machine.

    python -m benchmarks.self_speculative --model=models/smollm2 --out=FILE.json
    python -m benchmarks.self_speculative --preset=tiny_1m --exits=1,2 --spread=2 --drafts=2
    python -m benchmarks.self_speculative --model=runs/first/RUN --task=gsm_symbolic --new=256

Through `generate`, as a user has it: batch 1, greedy, 64 new tokens behind each prompt; for
every exit layer E and number of draft tokens K: the share of draft tokens that the full model
accepts, tokens a verification, milliseconds a token, and by how much it is faster than plain
decoding, which is timed in the same rounds. Besides exits, sets of evenly spread layers draft
(`--spread`: how many layers). The tokens are compared with the plain ones: in float32 they agree,
in bfloat16 near ties may fall otherwise (the first difference is reported). Compiling is not in the
times. A model that was not trained to exit early accepts little at early exits. A run's own set of
layers or routers are put aside, so that plain decoding is the full model's. With `--task`, the
prompts are test examples of the task, spread evenly, and answers end where the model ends them.
Run it alone.
"""

import argparse
import dataclasses
import itertools
import os
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.first_score import NEW_TOKENS, open_run, test_examples
from benchmarks.skip_speed import load, spread, write
from jaxreason.core import platform

# Text that a small model goes on with; the numbers of tokens are about the same.
PROMPTS = (
    "The history of the city begins with a small village at the river, where",
    "To bake bread at home you need flour, water, salt and yeast. First,",
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n",
    "1, 2, 3, 4, 5, 6, 7, 8, 9,",
)


class Bench:
    """One model in one precision with its prompts."""

    def __init__(self, args, dtype: str):
        from jaxreason.recipes.score_task import prompt_tokens
        from jaxreason.rollout import prepare

        if args.task:
            model, encode = open_run(pathlib.Path(args.model), dtype)
        else:
            model = load(args, dtype)
        model = dataclasses.replace(model, depth=None)
        self.args, self.model, self.layers = args, prepare(model, 1), model.config.num_layers
        if args.task:
            examples = test_examples(args.task, args.examples)
            self.prompts: Any = [prompt_tokens(encode, example) for example in examples]
        elif model.tokenizer is None:
            vocab = model.config.vocab_size
            self.prompts = np.random.default_rng(0).integers(3, vocab, (4, args.prompt))
            self.prompts = self.prompts.tolist()
        else:
            self.prompts = list(PROMPTS)

    def call(self, speculation: Any) -> tuple[Any, list[list[int]]]:
        """One prompt after the other; the stats, and the tokens."""
        from jaxreason.rollout import GREEDY, Stats, generate

        stats = Stats()
        done = generate(
            self.model, self.prompts, GREEDY, max_new_tokens=self.args.new,
            ignore_eos=not self.args.task, slots=1, speculation=speculation, stats=stats,
        )  # fmt: skip
        return stats, [c.tokens for c in done]

    def drafts(self) -> dict[str, Any]:
        """What drafts, by name."""
        from jaxreason.rollout import SelfSpeculation

        result = {}
        for k in numbers(self.args.drafts):
            for e in numbers(self.args.exits):
                result[f"exit {e}, {k} tokens"] = SelfSpeculation(exit_layer=e, tokens=k)
            for n in numbers(self.args.spread):
                layers = spread(self.layers, n)
                result[f"{n} spread, {k} tokens"] = SelfSpeculation(layers=layers, tokens=k)
        return result

    def against_plain(self, speculation: Any) -> dict[str, Any]:
        """Plain and speculative decoding in turn, `--rounds` times, after a call to warm up."""
        arms: tuple[Callable[[], Any], ...] = (
            lambda: self.call(None),
            lambda: self.call(speculation),
        )
        warm = [arm() for arm in arms]
        rounds: list[list[float]] = [[], []]
        for i in range(self.args.rounds):
            for arm in (0, 1) if i % 2 == 0 else (1, 0):
                stats = arms[arm]()[0]
                rounds[arm].append(1e3 * stats.decode_seconds / stats.decode_tokens)
        plain, ours = (statistics.median(values) for values in rounds)
        drafts = warm[1][0].drafts
        return {
            "layers": [i for i, kept in enumerate(drafts.completions[0].layers) if kept],
            "acceptance": drafts.acceptance,
            "tokens_per_verification": drafts.tokens_per_verification,
            "acceptance_by_prompt": [e.accepted / e.drafted for e in drafts.completions],
            "plain_ms_a_token": plain, "ms_a_token": ours,
            "plain_tokens_a_second": 1e3 / plain, "tokens_a_second": 1e3 / ours,
            "speedup": plain / ours,
            "first_difference": [first_difference(*pair) for pair in zip(warm[0][1], warm[1][1])],
            "rounds_ms": {"plain": rounds[0], "self_speculative": rounds[1]},
        }  # fmt: skip


def first_difference(a: list[int], b: list[int]) -> int | None:
    """The number of the first token that differs; None where none does."""
    pairs = itertools.zip_longest(a, b)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), None)


def numbers(text: str) -> list[int]:
    """The numbers of a flag such as 4,8."""
    return [int(x) for x in text.split(",") if x]


def main() -> None:
    """Prints a line a measurement and, with --out, writes all of them after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="a model's folder; else random weights")
    parser.add_argument("--preset", default="smollm2_135m", help="shape of the random weights")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--exits", default="6,12,18,24,27", help="layers before the exit")
    parser.add_argument("--spread", default="24", help="sizes of evenly spread sets")
    parser.add_argument("--drafts", default="2,4,6", help="draft tokens a verification")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of random prompts")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--task", choices=list(NEW_TOKENS), help="prompts of a run of first_table")
    parser.add_argument("--examples", type=int, default=8, help="prompts of the task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="", help="where to write the measurements as JSON")
    args = parser.parse_args()
    if args.task and not (pathlib.Path(args.model) / "config.json").is_file():
        parser.error(f"--model={args.model!r}; with --task expected a run's folder (config.json)")
    platform.prepare(restart=True, onednn=False)  # As `jaxreason.generate` does.
    platform.compilation_cache()
    load_at_start = os.getloadavg()[0]
    found: dict[str, dict[str, Any]] = {}
    for dtype in args.dtypes.split(","):
        bench, found[dtype] = Bench(args, dtype), {}
        for name, speculation in bench.drafts().items():
            result = found[dtype][name] = bench.against_plain(speculation)
            differ = sum(at is not None for at in result["first_difference"])
            print(
                f"{dtype}, {name}: {result['acceptance']:.1%} accepted, "
                f"{result['tokens_per_verification']:.2f} tokens a verification, "
                f"{result['plain_tokens_a_second']:.1f} -> {result['tokens_a_second']:.1f} "
                f"tokens/s (x{result['speedup']:.2f}), {differ} of "
                f"{len(result['first_difference'])} texts differ"
            )
            sys.stdout.flush()
            if args.out:
                write(args, found, load_at_start)


if __name__ == "__main__":
    main()
