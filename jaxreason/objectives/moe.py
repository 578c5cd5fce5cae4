"""What a mixture of experts adds to a training loss: balanced experts, small router logits."""

import jax
import jax.numpy as jnp
import optax

from jaxreason.core.errors import UserError
from jaxreason.core.objective import Objective
from jaxreason.nn.moe import Moe


def router_losses(moe: Moe) -> Objective:
    """`moe.balance` times the load-balancing loss plus `moe.router_z` times the router's z-loss.

    Balance (Switch Transformer, arXiv 2101.03961, equations 4 to 6; layers pooled as in the code
    released with OLMoE): `E sum_e f_e P_e`, f_e the assignments to expert e a token and P_e its
    mean probability, both over all layers and tokens that are not padding. It is k, the experts a
    token, where all are used evenly.
    z-loss (ST-MoE, arXiv 2202.08906): the mean of the router's squared log-partition.

    Both divide by the tokens of the global batch. f_e is counted over the whole batch on every
    mesh; with `train.accumulate` above 1 it is a micro-batch's own (as in official code, where
    it is a device's), and the loss is the mean of the micro-batches' by their tokens. The z-loss is
    a plain mean, the same for any accumulation. Combine it with `lm.next_token`.

    Metrics: both losses, `busiest_expert` (its share of the tokens over that of even routing), and
    with `moe.capacity_factor` `dropped`, the share of assignments that found no room.
    """

    def denominators(batch):
        tokens = jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)
        return {"balance": tokens, "router_z": tokens}

    def terms(outputs, frozen, batch, aux_state, key, step):
        if outputs.aux is None or "router_logits" not in outputs.aux:
            raise UserError("the router's losses need a model with experts; set model.moe")
        logits, experts = outputs.aux["router_logits"], outputs.aux["experts"]
        layers, num_experts = logits.shape[0], logits.shape[-1]
        real = (batch["segment_ids"] > 0).astype(jnp.float32)
        tokens = jnp.sum(real)
        rows = jnp.maximum(layers * tokens, 1.0)
        chosen = jnp.sum(jax.nn.one_hot(experts, num_experts, dtype=jnp.float32), axis=-2)
        share_e = jnp.sum(chosen * real[None, :, :, None], axis=(0, 1, 2)) / rows
        probs = jax.nn.softmax(logits, axis=-1)
        prob_e = jnp.sum(probs * real[None, :, :, None], axis=(0, 1, 2)) / rows
        balance = tokens * num_experts * jnp.sum(share_e * prob_e)
        z = jax.nn.logsumexp(logits, axis=-1)
        router_z = jnp.sum(z * z * real[None]) / layers
        # 1 where all experts have the same number of tokens.
        busiest = jnp.max(share_e) * num_experts / experts.shape[-1]
        metrics = {
            "balance": (balance, tokens),
            "router_z": (router_z, tokens),
            "busiest_expert": (tokens * busiest, tokens),
        }
        if "dropped" in outputs.aux:  # Of the assignments of tokens to experts, over all layers.
            lost = jnp.sum(outputs.aux["dropped"] * real[None]) / (layers * experts.shape[-1])
            metrics["dropped"] = (lost, tokens)
        return {"balance": balance, "router_z": router_z}, metrics, None

    return Objective(
        denominators=denominators,
        terms=terms,
        coefficients={
            "balance": optax.constant_schedule(moe.balance),
            "router_z": optax.constant_schedule(moe.router_z),
        },
        needs=("segment_ids",),
    )
