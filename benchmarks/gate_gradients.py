"""How well the gradient of a layer's gate tells what the layer is worth (stage 1 of FiRST).

    python -m benchmarks.gate_gradients          # 10 minutes on 2 CPU cores with AMX

What a layer is worth is what the loss of the completions rises by when it alone is skipped (prompts
are read by all). Against it stand gradients of the loss by the layers' gates at several points: all
layers run; gates drawn, hard or uniform. For each: Spearman's correlation over the layers that may
be skipped, and the loss of the 24 layers that it would keep. SmolLM2-135M-Instruct on 6 training
batches of the docstrings task; nothing is trained. Writes docs/results/gate_gradients.json after
each line.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterator

from jaxreason.core import platform

OUT = pathlib.Path("docs/results/gate_gradients.json")
CONFIG = "experiments/first/smollm2.py:docstrings,influence,skip=0.2,seed=100"
BATCHES, KEPT = 6, 24


def draws(rng, shape: tuple[int, ...]) -> dict[str, Callable[[], Iterator]]:
    """The points at which gradients are taken: gates [L,B,S] by name, one array a pass."""
    import numpy as np

    def hard(kept_share: float, passes: int):
        for _ in range(passes):
            yield (rng.random(shape) < kept_share).astype(np.float32)

    def uniform(share: float, passes: int):
        for _ in range(passes):
            yield np.where(rng.random(shape) < share, rng.random(shape), 1.0).astype(np.float32)

    return {
        "all layers run": lambda: iter([np.ones(shape, np.float32)]),
        "hard, a tenth skipped": lambda: hard(0.9, 1),
        "hard, a fifth skipped": lambda: hard(0.8, 1),
        "uniform, a tenth drawn": lambda: uniform(0.1, 1),
        "uniform, a quarter drawn": lambda: uniform(0.25, 1),
        "uniform, a quarter drawn, 3 passes": lambda: uniform(0.25, 3),
        "uniform, half drawn": lambda: uniform(0.5, 1),
    }


def main() -> None:
    """Measures and writes."""
    platform.prepare()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxreason import config as config_lib
    from jaxreason.core.mesh import use_mesh
    from jaxreason.depth import segments
    from jaxreason.depth.decision import static_routers
    from jaxreason.models import decoder
    from jaxreason.nn.cross_entropy import cross_entropy
    from jaxreason.nn.layer_wrap import LayerWrap
    from jaxreason.recipes import first, recipes
    from jaxreason.recipes.first_phases import make_forward

    known = {f"{cls.__module__}.{cls.__name__}": cls for cls in recipes()}
    flags = ["--config.lora=None", "--config.train.steps=1", "--config.run.dir=runs/none"]
    cfg = config_lib.parse([f"--config={CONFIG}", *flags], recipes=known).config
    built = first.build(cfg)
    model, number = built.model, built.model.num_layers
    forward = make_forward(built.cfg, model, hard=True)
    results: dict = {"config": CONFIG, "batches": BATCHES, "kept": KEPT, "layers": [], "rows": []}

    def nll(outputs, batch):
        return cross_entropy(
            outputs.final, outputs.unembed, batch["targets"], batch["loss_weights"], 0.0,
            outputs.soft_cap, 0, outputs.kernels, True,
        )  # fmt: skip

    with use_mesh(built.mesh):
        state = built.init_state()
        params = built.groups(state)
        influential = np.asarray(state.params["routers"]["b"]) > 0
        batches = [built.put(built.train_data.batch(i)) for i in range(BATCHES)]
        weight = sum(float(batch["loss_weights"].sum()) for batch in batches)
        skipped = jax.jit(lambda params, batch: nll(forward(params, batch), batch).nll)

        def loss(keep) -> float:
            routers = jax.tree.map(jnp.asarray, static_routers(tuple(keep), model.d_model))
            at = params | {"routers": routers}
            return sum(float(skipped(at, batch)) for batch in batches) / weight

        @jax.jit
        def slopes(params, batch, gates_lbs):
            where = segments.of_batch(batch)

            def apply(run, x, cache, gate_bs):
                new, cache, routed = run(x, cache)
                gate = jnp.where(~where.valid | where.prompt, 1.0, where.spread(gate_bs))
                mixed = gate[:, :, None] * new.astype(jnp.float32)
                mixed += (1.0 - gate[:, :, None]) * x.astype(jnp.float32)
                x = jax.lax.optimization_barrier(mixed.astype(x.dtype))
                return x, cache, routed, jnp.zeros(())

            def of(gates):
                outputs = decoder.forward(
                    params["model"], model, batch, dtype=built.dtype, wrap=LayerWrap(apply, gates)
                )
                return nll(outputs, batch).loss

            value, slope = jax.value_and_grad(of)(gates_lbs)
            return value, jnp.sum(slope, axis=(1, 2))

        def keep_out() -> None:
            OUT.parent.mkdir(parents=True, exist_ok=True)
            new = OUT.with_suffix(".new")
            new.write_text(json.dumps(results, indent=1) + "\n")
            os.replace(new, OUT)

        results["all_layers"] = loss([True] * number)
        for layer in range(number):
            without = loss([i != layer for i in range(number)]) - results["all_layers"]
            results["layers"].append(round(without, 4))
            print(f"without layer {layer}: {without:+.4f}", flush=True)
        worth, routed = np.array(results["layers"]), slice(1, number - 1)

        def best(score) -> list[bool]:
            order = np.argsort(-np.where(np.isin(range(number), (0, number - 1)), np.inf, score))
            return [bool(layer in order[:KEPT]) for layer in range(number)]

        def row(name: str, score, keep, at: float | None = None) -> None:
            rank = None
            if score is not None:  # Spearman's: no two are equal.
                places = [np.argsort(np.argsort(values[routed])) for values in (score, worth)]
                rank = round(float(np.corrcoef(places[0], places[1])[0, 1]), 3)
            entry = {"by": name, "loss_there": at, "spearman": rank, "loss_of_kept": loss(keep),
                     "skipped": [int(i) for i in np.flatnonzero(~np.array(keep))]}  # fmt: skip
            results["rows"].append(entry)
            print(entry, flush=True)
            keep_out()

        row("what each is worth alone", worth, best(worth))
        row("block influence", None, influential.tolist())
        shape = (number, *segments.of_batch(batches[0]).has_prompt().shape)
        for name, points in draws(np.random.default_rng(0), shape).items():
            total, at, passes = np.zeros(number), 0.0, 0
            for gates in points():
                gates[[0, -1]] = 1.0
                for batch in batches:
                    value, slope = slopes(params, batch, jnp.asarray(gates))
                    total, at = total - np.asarray(slope, np.float64), at + float(value)
                passes += 1
            row(name, total, best(total), round(at / weight / passes, 4))


if __name__ == "__main__":
    main()
