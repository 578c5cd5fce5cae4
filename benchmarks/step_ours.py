"""Times this program's training step on one shape; prints one line of JSON.

The very step that a run jits (phases, objective, clipping, AdamW, guard, update statistics) on
random tokens: d 512, 8 layers, 8 heads, ffn 1408, vocabulary 8192, 16 x 256 tokens.
"""

import argparse
import json
import os
import time

from jaxreason.core import platform


def main() -> None:
    """Compiles, warms up, times single steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="bench_30m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--layers", default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()
    platform.prepare(restart=True)

    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxreason.core import params as P
    from jaxreason.core.precision import as_dtype, resolve_dtype
    from jaxreason.models import decoder
    from jaxreason.models.presets import PRESETS
    from jaxreason.objectives.lm import NextToken
    from jaxreason.recipes.methods import make_phases
    from jaxreason.train import state as state_lib
    from jaxreason.train.optim import OptimConfig, make_optimiser
    from jaxreason.train.step import make_train_step

    preset = PRESETS[args.preset]
    preset = dataclasses.replace(preset, kernels=args.kernels, layers=args.layers)
    cfg = decoder.resolve(preset)
    dtype = resolve_dtype(args.dtype)
    specs = decoder.specs(cfg)
    phase = make_phases(
        NextToken(),
        steps=100,
        optimiser=make_optimiser(OptimConfig(), specs, 100),
        student_layers=cfg.num_layers,
    )[0]
    create = lambda: state_lib.create(  # noqa: E731
        {"model": P.initialise(specs, jax.random.key(0))}, [phase]
    )

    def forward(params, batch, capture, key=None):
        return decoder.forward(params["model"], cfg, batch, dtype=as_dtype(dtype), capture=capture)

    step = jax.jit(
        make_train_step(forward, phase, key=jax.random.key(1), clip_norm=1.0), donate_argnums=0
    )
    rng = np.random.default_rng(0)
    shape = (args.batch, args.seq)
    tokens = rng.integers(0, cfg.vocab_size, (2, *shape)).astype(np.int32)
    batch = {
        "tokens": jnp.asarray(tokens[0]),
        "targets": jnp.asarray(tokens[1]),
        "positions": jnp.tile(jnp.arange(args.seq, dtype=jnp.int32)[None], (args.batch, 1)),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "loss_weights": jnp.ones(shape, jnp.float32),
    }
    state, began = jax.jit(create)(), time.perf_counter()
    times, cpu = [], []
    for i in range(args.warmup + args.steps):
        start, start_cpu = time.perf_counter(), time.process_time()
        state, metrics = step(state, {}, batch)
        jax.block_until_ready((state, metrics))
        if i == 0:
            first = time.perf_counter() - began
        if i >= args.warmup:
            times.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
    count, median = args.batch * args.seq, float(np.median(times))
    flops = 3 * count * decoder.forward_flops(cfg, args.seq)
    print(
        json.dumps(
            {
                "what": "jaxreason",
                "params": P.count(specs),
                "dtype": dtype,
                "kernels": cfg.kernels,
                "layers": cfg.layers,
                "first_step_s": round(first, 2),
                "step_s_min": round(min(times), 4),
                "step_s_median": round(median, 4),
                "cpu_s_median": round(float(np.median(cpu)), 3),
                "tokens_per_s_median": round(count / median),
                "tokens_per_s_best": round(count / min(times)),
                "tflops_median": round(flops / median / 1e12, 3),
                "load": os.getloadavg()[0],
                "jax": jax.__version__,
                "xla_flags": os.environ.get("XLA_FLAGS", ""),
            }
        )
    )


if __name__ == "__main__":
    main()
