"""LayerSkip's training forward and its loss: layers dropped by row, an exit after every layer.

The equations and where each comes from: `depth.layerskip` (arXiv 2404.16710).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreason.core.objective import Batch, Objective, combine
from jaxreason.core.outputs import Outputs
from jaxreason.core.rng import named
from jaxreason.depth import layerskip
from jaxreason.depth.layerskip import LayerSkipPretraining, LayerSkipRecipe
from jaxreason.models import decoder
from jaxreason.models.model_config import ModelConfig
from jaxreason.nn.cross_entropy import auto_chunk, cross_entropy
from jaxreason.nn.layer_wrap import LayerWrap
from jaxreason.nn.linear import linear
from jaxreason.nn.norm import norm


def dropout_wrap(rates_l: jax.Array, key: jax.Array, batch: Batch) -> LayerWrap:
    """Layers that are dropped by row: the row's stream passes by attention and MLP.

    `rates_l` [L] are probabilities. Whether a row drops a layer follows from the key, the layer and
    the row's first `example_id` [B,T], so that micro-batches drop what the whole batch drops. Rows
    hold several packed examples, which share their row's lot (the paper's samples are rows too).
    """

    def of_layer(layer_key):
        draw = lambda i: jax.random.uniform(jax.random.fold_in(layer_key, i))  # noqa: E731
        return jax.vmap(draw)(batch["example_id"][:, 0])

    draws = jax.vmap(of_layer)(jax.random.split(named(key, "layer_dropout"), len(rates_l)))
    keep_lb = draws >= rates_l[:, None]

    def apply(run, x, cache, keep_b):
        new, cache, routed = run(x, cache)
        # Unrolled, XLA would compute the sums of all layers below again in each (depth.first).
        x = jax.lax.optimization_barrier(jnp.where(keep_b[:, None, None], new, x))
        return x, cache, routed, ()

    return LayerWrap(apply, keep_lb)


@flax.struct.dataclass
class Head:
    """What stands between a residual stream and the unembedding: the model's end, for any exit."""

    params: dict[str, Any]
    model: ModelConfig = flax.struct.field(pytree_node=False)
    kernels: str = flax.struct.field(pytree_node=False)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        """The stream as `Outputs.final` would be if it were the last, [B,T,E]."""
        cfg = self.model
        if cfg.final_norm:
            x_btd = norm(cfg.norm, x_btd, self.params["final_norm"], cfg.norm_eps, self.kernels)
        if cfg.token_width != cfg.d_model:
            x_btd = linear(x_btd, self.params["embed_out"], self.kernels)
        return x_btd


def forward(
    cfg: LayerSkipRecipe,
    model: ModelConfig,
    weights: Any,
    batch: Batch,
    run: Callable[[LayerWrap | None], Outputs],
    *,
    key: jax.Array | None,
    steps: int = 0,
) -> Outputs:
    """All layers by `run(wrap)`, dropped at random where `key` is given; `Outputs.depth` is `Head`.

    `weights` are the model's. With S(t) over time (`LayerSkipPretraining`), `batch["step"]` has to
    be the step, of `steps`.
    """
    wrap = None
    if key is not None and cfg.dropout > 0:
        rates = jnp.asarray(layerskip.dropout_rates(cfg.dropout, model.num_layers), jnp.float32)
        if isinstance(cfg, LayerSkipPretraining) and cfg.over_time == "exponential":
            rates = rates * layerskip.time_scale(steps, batch["step"])
        wrap = dropout_wrap(rates, key, batch)
    outputs = run(wrap)
    end = {name: weights[name] for name in ("final_norm", "embed_out") if name in weights}
    head = Head(decoder.cast(end, outputs.final.dtype), model, outputs.kernels)
    return dataclasses.replace(outputs, depth=head)


def with_exits(
    cfg: LayerSkipRecipe,
    plain: Objective,
    num_layers: int,
    steps: int,
    *,
    z_loss: float = 0.0,
    chunk: int = 0,
) -> Objective:
    """`plain` (which has the term `nll` of the model's output) with the losses of the exits.

    `nll` is weighed by e~(t, L-1); the exits below are one term, `exits`, of coefficient 1. Their
    states are those of `forward`, and logits are made by chunks, for the exits enabled at a step
    alone: under a rotational curriculum the states of ceil(L/R) layers are gathered, otherwise
    chunks whose layers have no weight are passed over.

    Metrics: `exits` the mean loss of the enabled exits by their weights, `exits_enabled` how many.
    """
    scales = lambda step: layerskip.loss_scales(cfg, num_layers, steps, step)  # noqa: E731
    last = {"nll": lambda step: scales(step)[num_layers - 1]}
    plain = dataclasses.replace(plain, coefficients={**plain.coefficients, **last})
    if cfg.e_scale == 0 or num_layers == 1:
        return plain
    early = np.arange(int(cfg.scale == "paper"), num_layers - 1)  # The paper's e(0) is 0.
    if not len(early):
        return plain

    def chosen(step):
        """The layers whose states are read at a step, as numbers into `early`, and their e~."""
        if cfg.curriculum != "rotational":
            return None, scales(step)[early]
        turns = np.arange(0, num_layers, cfg.interval)
        layers = (turns + step) % num_layers
        known = (layers >= early[0]) & (layers <= early[-1])
        return jnp.clip(layers - early[0], 0, len(early) - 1), scales(step)[layers] * known

    def denominators(batch):
        return {"exits": jnp.sum(batch["loss_weights"], dtype=jnp.float32)}

    def terms(outputs, frozen, batch, aux_state, key, step):
        at, scale_k = chosen(step)
        states = [outputs.captured[int(layer) + 1] for layer in early]
        if at is None:
            x = jnp.stack(states, axis=2)
        else:
            x = jnp.moveaxis(jnp.take(jnp.stack(states), at, axis=0), 0, 2)
        rows, time, count, width = x.shape
        # Exits stand side by side at each token, so that a mesh cuts the sequence as before.
        each = lambda y: jnp.repeat(y, count, axis=1)  # noqa: E731
        weights = batch["loss_weights"].astype(jnp.float32)
        weights_k = (weights[:, :, None] * scale_k[None, None]).reshape(rows, time * count)
        # An eighth of the plain row at most, as next-token prediction takes of sparse rows.
        piece = auto_chunk((rows, max(1, time // 8)), outputs.unembed.shape[1], chunk)
        sums = cross_entropy(
            outputs.depth(x.reshape(rows, time * count, width)), outputs.unembed,
            each(batch["targets"]), weights_k,
            z_loss, outputs.soft_cap, piece, outputs.kernels, True,
        )  # fmt: skip
        total, tokens = jnp.sum(scale_k), jnp.sum(weights)
        metrics = {
            "exits": (sums.nll / jnp.maximum(total, 1e-30), tokens * (total > 0)),
            "exits_enabled": (jnp.sum(scale_k > 0) * tokens, tokens),
        }
        return {"exits": sums.loss}, metrics, None

    exits = Objective(
        denominators=denominators,
        terms=terms,
        coefficients={"exits": optax.constant_schedule(1.0)},
        captures=tuple(int(layer) + 1 for layer in early),
    )
    return combine(plain, exits)
