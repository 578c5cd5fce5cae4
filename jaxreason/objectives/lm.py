"""Next-token prediction."""

import dataclasses

import jax.numpy as jnp
import optax

from jaxreason.core.objective import Objective, Schedule
from jaxreason.nn.cross_entropy import cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    """Plain next-token prediction: the baseline of every method."""


def next_token(
    *,
    z_loss: float = 0.0,
    chunk: int = 0,
    sparse: bool = False,
    coefficient: Schedule | None = None,
) -> Objective:
    """Mean over weighted tokens of `-log p(target)`, plus `z_loss * logsumexp^2` (PaLM).

    `chunk` is the number of tokens a row whose float32 logits are held at once (0: automatic).
    `sparse`: most tokens have no weight, as where prompts are not learned; only the time changes.
    """

    def denominators(batch):
        return {"nll": jnp.sum(batch["loss_weights"], dtype=jnp.float32)}

    def terms(outputs, frozen, batch, aux_state, key, step):
        weights = batch["loss_weights"]
        sums = cross_entropy(
            outputs.final, outputs.unembed, batch["targets"], weights,
            z_loss, outputs.soft_cap, chunk, outputs.kernels, sparse,
        )  # fmt: skip
        count = jnp.sum(weights, dtype=jnp.float32)
        metrics = {
            "nll": (sums.nll, count),
            "accuracy": (sums.correct, count),
            "log_z_squared": (sums.z_squared, count),
        }
        return {"nll": sums.loss}, metrics, None

    return Objective(
        denominators=denominators,
        terms=terms,
        coefficients={"nll": coefficient or optax.constant_schedule(1.0)},
    )
