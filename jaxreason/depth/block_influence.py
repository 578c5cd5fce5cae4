"""Block influence: how much a layer changes its input (ShortGPT, arXiv 2403.03853)."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.core.outputs import Outputs
from jaxreason.nn.layer_wrap import LayerWrap


def influence_wrap(valid_bt: jax.Array, num_layers: int) -> LayerWrap:
    """Layers as they are, measured; `Outputs.depth` [L] is the sum over valid tokens of 1 - cos.

    `cos` is between the streams that enter and leave the layer, in float32; `valid_bt` [B,T] bool.
    """

    def apply(run, x, cache, _):
        new, cache, routed = run(x, cache)
        a, b = x.astype(jnp.float32), new.astype(jnp.float32)
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        cos = jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-12)
        return new, cache, routed, jnp.sum(jnp.where(valid_bt, 1.0 - cos, 0.0))

    return LayerWrap(apply, jnp.zeros((num_layers, 0)))


def block_influence(
    run: Callable[[Any, Any, LayerWrap], Outputs],
    params: Any,
    batches: Iterable[Any],
    num_layers: int,
) -> np.ndarray:
    """Each layer's influence [L], `1 - E[cos(h_l, h_(l+1))]` over all tokens of the batches.

    `run(params, batch, wrap)` is the model's forward. Source: ShortGPT, arXiv 2403.03853,
    equation 1.

    Raises:
      UserError: the batches have no token.
    """

    @jax.jit
    def measure(params, batch):
        valid = batch["segment_ids"] > 0
        return run(params, batch, influence_wrap(valid, num_layers)).depth, jnp.sum(valid)

    total, tokens = np.zeros(num_layers), 0
    for batch in batches:
        sums, count = measure(params, batch)
        total, tokens = total + np.asarray(sums, np.float64), tokens + int(count)
    if not tokens:
        raise UserError("block influence was given no token; expected at least one batch of text")
    return total / tokens
