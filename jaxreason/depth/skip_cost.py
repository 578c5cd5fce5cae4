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
from jaxreason.depth import segments
from jaxreason.depth.decision import Scope
from jaxreason.nn.cross_entropy import cross_entropy
from jaxreason.nn.layer_wrap import LayerWrap, run_or_skip


def skip_costs(
    run: Callable[[Any, Any, LayerWrap], Outputs],
    params: Any,
    batches: Sequence[Any],
    always: Sequence[bool],
    *,
    scope: Scope = "decode_only",
) -> np.ndarray:
    """Each layer's skip cost [L], nats a learned token; infinite for the layers of `always` [L].

    A batch takes one forward with all layers, which keeps for each layer the stream behind it with
    the layer left out ([L,B,T,D]), and from there, for each layer, the layers above it: on the
    whole the work of L / 2 forwards, by two programs. The tokens are the same for every layer, so
    the differences are paired. A segment without a prompt leaves out nothing, as in training.
    `run(params, batch, wrap)` is the model's forward.

    Raises:
      UserError: the batches have no learned token.
    """
    num_layers = len(always)

    def nll_of(out: Outputs, batch: Any) -> jax.Array:
        sums = cross_entropy(
            out.final, out.unembed, batch["targets"], batch["loss_weights"], 0.0, out.soft_cap, 0,
            out.kernels, True,
        )  # fmt: skip
        return sums.nll

    @jax.jit
    def whole(params, batch):
        where = segments.of_batch(batch)
        runs_all = ~where.valid | ~where.spread(where.has_prompt())
        runs_all |= where.prompt if scope == "decode_only" else False

        def apply(run_layer, x, cache, _):
            new, cache, routed = run_layer(x, cache)
            return new, cache, routed, jnp.where(runs_all[:, :, None], new, x)

        out = run(params, batch, LayerWrap(apply, jnp.zeros((num_layers, 0))))
        return nll_of(out, batch), jnp.sum(batch["loss_weights"]), out.depth

    @jax.jit
    def above(params, batch, behind, layer):
        def apply(run_layer, x, cache, index):
            x = jnp.where(index <= layer, behind, x)
            return *run_or_skip(index > layer, run_layer, x, cache), ()

        out = run(params, batch, LayerWrap(apply, jnp.arange(num_layers)))
        return nll_of(out, batch)

    costs = np.where(always, np.inf, 0.0)
    total = tokens = 0.0
    for batch in batches:
        nll, weight, behind = whole(params, batch)
        total, tokens = total + float(nll), tokens + float(weight)
        for layer in np.flatnonzero(~np.asarray(always)):
            costs[layer] += float(above(params, batch, behind[layer], layer))
    if not tokens:
        raise UserError("skip costs were given no learned token; expected at least one batch")
    return (costs - total) / tokens
