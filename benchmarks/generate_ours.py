"""Times our `generate` on a model in a folder; one line of JSON for `benchmarks.generate_speed`.

Seconds of whole calls, and of calls for one token (that is the prefill), at each batch size.
"""

import argparse
import json
import os
import time

from jaxreason.core import platform


def main() -> None:
    """Loads the model once, and for each batch size compiles, warms up and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    platform.prepare(restart=True, onednn=False)  # As `jaxreason.generate` does.
    platform.compilation_cache()

    import jax
    import numpy as np

    from jaxreason.models.hf import load_hf
    from jaxreason.rollout import GREEDY, Stats, generate, prepare

    start = time.perf_counter()
    loaded = load_hf(args.model, dtype=args.dtype, param_dtype=args.dtype)
    load_s = time.perf_counter() - start

    def measure(batch: int) -> dict:
        model = prepare(loaded, batch)
        # Of the table a token reads one row; where it is tied, it is the unembedding besides.
        read = {name: leaf for name, leaf in model.params.items() if name != "embed"}
        # The same prompts as the reference's: numpy's generator is the same everywhere.
        prompts = np.random.default_rng(batch).integers(3, 49152, (batch, args.prompt)).tolist()

        def call(new: int, stats: Stats | None = None) -> tuple[float, list[list[int]]]:
            begin = time.perf_counter()
            done = generate(
                model, prompts, GREEDY, max_new_tokens=new, ignore_eos=True, slots=batch,
                stats=stats,
            )  # fmt: skip
            seconds = time.perf_counter() - begin
            return seconds, [c.tokens for c in done]

        stats = Stats()
        first = [call(args.new, stats)[0], call(args.new)[0]]
        call(1)
        prefill, whole, tokens = [], [], []
        for _ in range(args.repeats):
            prefill.append(call(1)[0])
            seconds, tokens = call(args.new)
            whole.append(seconds)
        return {
            "first_s": first,
            "weight_bytes": sum(x.nbytes for x in jax.tree.leaves(read)),
            "compile_s": stats.compile_seconds,
            "prefill_s": prefill,
            "whole_s": whole,
            "tokens": tokens,
        }

    result = {batch: measure(batch) for batch in map(int, args.batches.split(","))}
    print(
        json.dumps(
            {
                "what": "jaxreason",
                "dtype": args.dtype,
                "batches": result,
                "load_s": load_s,
                "devices": len(jax.devices()),
                "load": os.getloadavg()[0],
                "versions": {"jax": jax.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
