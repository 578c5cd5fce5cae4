"""Held-out loss in nats a token and bits a byte, one exact pass over the data."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core.outputs import Outputs
from jaxreason.nn.cross_entropy import cross_entropy


def make_eval_step(
    forward: Callable[[Any, Mapping[str, jax.Array]], Outputs],
    chunk: int = 0,
    sparse: bool = False,
) -> Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """Returns `step(params, batch) -> {nll, correct, tokens}`: sums of one batch, to be jitted.

    `sparse` says that most tokens have no weight (nn.cross_entropy).
    """

    def step(params, batch):
        outputs = forward(params, batch)
        sums = cross_entropy(
            outputs.final, outputs.unembed, batch["targets"], batch["loss_weights"],
            0.0, outputs.soft_cap, chunk, outputs.kernels, sparse,
        )  # fmt: skip
        tokens = jnp.sum(batch["loss_weights"], dtype=jnp.float32)
        return {"nll": sums.nll, "correct": sums.correct, "tokens": tokens}

    return step


def perplexity(
    eval_step: Callable, params: Any, batches: Iterable[Mapping[str, Any]], bytes_per_token: float
) -> dict[str, float]:
    """Means over all target tokens of the batches, added up in float64 on the host.

    `loss` in nats a token, `bits_per_byte` by the split's own bytes a token, `accuracy` of the
    most likely token.
    """
    sums = [eval_step(params, batch) for batch in batches]
    total = {k: float(np.sum([np.float64(s[k]) for s in sums])) for k in sums[0]}
    tokens = max(total["tokens"], 1.0)
    loss = total["nll"] / tokens
    return {
        "loss": loss,
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "accuracy": total["correct"] / tokens,
    }
