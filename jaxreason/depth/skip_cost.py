"""Skip cost: by how much the loss rises when a layer alone is left out (arXiv 2402.02834).

    cost_l = L(all layers but l) - L(all layers)

Shortened LLaMA ranks blocks by the perplexity of the model without each of them [paper]. Here it is
the loss of the completions, and under scope decode_only the prompt is read by all layers
[reconstructed].
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.core.outputs import Outputs
from jaxreason.depth import first
from jaxreason.depth.decision import Decision, Scope, static_routers
from jaxreason.nn.cross_entropy import cross_entropy
from jaxreason.nn.layer_wrap import LayerWrap


def skip_costs(
    run: Callable[[Any, Any, LayerWrap], Outputs],
    params: Any,
    batches: Sequence[Any],
    always: Sequence[bool],
    d_model: int,
    *,
    scope: Scope = "decode_only",
) -> np.ndarray:
    """Each layer's skip cost [L], nats a learned token; infinite for the layers of `always` [L].

    A batch takes one forward with all layers and one without each of the others, all by one
    program. The tokens are the same for every layer, so the differences are paired.
    `run(params, batch, wrap)` is the model's forward.

    Raises:
      UserError: the batches have no learned token.
    """
    # Routers that do not look, so that a layer is skipped as training and generation skip it.
    gating = first.FirstConfig(scope=scope, decision=Decision(always_keep=()))

    @jax.jit
    def loss(params, batch, keep_l):
        routers = static_routers(keep_l, d_model)
        out = first.forward(gating, routers, batch, lambda w: run(params, batch, w), hard=True)
        weights = batch["loss_weights"]
        sums = cross_entropy(
            out.final, out.unembed, batch["targets"], weights, 0.0, out.soft_cap, 0, out.kernels,
            True,
        )  # fmt: skip
        return sums.nll, jnp.sum(weights)

    def total(keep: np.ndarray) -> tuple[float, float]:
        found = [loss(params, batch, jnp.asarray(keep)) for batch in batches]
        return sum(float(nll) for nll, _ in found), sum(float(weight) for _, weight in found)

    layers = np.arange(len(always))
    whole, tokens = total(np.ones(len(always), bool))
    if not tokens:
        raise UserError("skip costs were given no learned token; expected at least one batch")
    costs = np.full(len(always), np.inf)
    for layer in layers[~np.asarray(always)]:
        costs[layer] = (total(layers != layer)[0] - whole) / tokens
    return costs
