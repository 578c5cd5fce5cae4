"""Cross-entropy and distillation by chunks of the sequence: float32 logits are never held whole."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxreason.nn.kernels import cpu
from jaxreason.nn.linear import linear

# Float32 logits held at once, in elements a call (256 MB), where no chunk is configured.
AUTO_ELEMENTS = 2**26


class TokenLoss(NamedTuple):
    """Sums over weighted tokens, float32: `loss` carries the gradient, the others are metrics."""

    loss: jax.Array
    nll: jax.Array
    z_squared: jax.Array
    correct: jax.Array


def _zero() -> TokenLoss:
    zero = jnp.float32(0)
    return TokenLoss(zero, zero, zero, zero)


def auto_chunk(shape: tuple[int, ...], vocab: int, chunk: int = 0) -> int:
    """Tokens a row of a [B,T] batch to treat at once: `chunk`, or the largest divisor that fits."""
    batch, time = shape
    if not chunk:
        chunk = max(1, AUTO_ELEMENTS // (batch * vocab))
    chunk = min(chunk, time)
    while time % chunk:
        chunk -= 1
    return chunk


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B,T,...] -> [T/chunk, B, chunk, ...]: the batch axis stays sharded as it was."""
    b, t = x.shape[:2]
    return jnp.moveaxis(x.reshape(b, t // chunk, chunk, *x.shape[2:]), 1, 0)


def _logits(hidden, unembed, soft_cap, kernels):
    if kernels == "cpu":  # Asked for float32, XLA would leave AMX (see kernels/cpu.py).
        raw = cpu.linear(hidden, unembed).astype(jnp.float32)
    else:
        raw = jnp.einsum("btd,dv->btv", hidden, unembed, preferred_element_type=jnp.float32)
    return raw if soft_cap is None else soft_cap * jnp.tanh(raw / soft_cap)


def _chunk_sums(hidden, unembed, targets, weights, z_loss, soft_cap, kernels):
    logits = _logits(hidden, unembed, soft_cap, kernels)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jnp.sum(weights * (log_z - at_target))
    z_squared = jnp.sum(weights * log_z**2)
    correct = jnp.sum(weights * (at_target >= logits.max(axis=-1)))
    return TokenLoss(nll + z_loss * z_squared, nll, z_squared, correct), (logits, log_z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def cross_entropy(
    hidden_btd: jax.Array,
    unembed_dv: jax.Array,
    targets_bt: jax.Array,
    weights_bt: jax.Array,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk: int = 0,
    kernels: str = "xla",
) -> TokenLoss:
    """Sum over tokens of `w * (logsumexp - logit[target] + z_loss * logsumexp^2)`, in nats.

    Only `.loss` may be differentiated, with respect to `hidden` and `unembed`: its gradient is
    computed chunk by chunk beside the forward, so no logits are kept and none is computed twice.
    """
    chunk = auto_chunk(targets_bt.shape, unembed_dv.shape[1], chunk)

    def body(total, xs):
        sums, _ = _chunk_sums(xs[0], unembed_dv, xs[1], xs[2], z_loss, soft_cap, kernels)
        return jax.tree.map(jnp.add, total, sums), None

    xs = tuple(_split(x, chunk) for x in (hidden_btd, targets_bt, weights_bt))
    return jax.lax.scan(body, _zero(), xs)[0]


def _forward(hidden_btd, unembed_dv, targets_bt, weights_bt, z_loss, soft_cap, chunk, kernels):
    chunk = auto_chunk(targets_bt.shape, unembed_dv.shape[1], chunk)

    def body(carry, xs):
        total, d_unembed = carry
        hidden, targets, weights = xs
        sums, (logits, log_z) = _chunk_sums(
            hidden, unembed_dv, targets, weights, z_loss, soft_cap, kernels
        )
        # d(log_z - logit_y + z log_z^2) / d logits = p (1 + 2 z log_z) - onehot(y)
        d = jnp.exp(logits - log_z[..., None]) * (1 + 2 * z_loss * log_z)[..., None]
        d = d - jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.float32)
        d = d * weights[..., None]
        if soft_cap is not None:
            d = d * (1 - (logits / soft_cap) ** 2)
        d = d.astype(hidden.dtype)
        d_hidden = linear(d, unembed_dv.T, kernels)
        if kernels == "cpu":
            rows = hidden.reshape(-1, hidden.shape[-1])
            d_unembed += (rows.T @ d.reshape(-1, d.shape[-1])).astype(jnp.float32)
        else:
            d_unembed += jnp.einsum("btd,btv->dv", hidden, d, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, total, sums), d_unembed), d_hidden

    xs = tuple(_split(x, chunk) for x in (hidden_btd, targets_bt, weights_bt))
    start = (_zero(), jnp.zeros(unembed_dv.shape, jnp.float32))
    (sums, d_unembed), d_hidden = jax.lax.scan(body, start, xs)
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden_btd.shape)
    return sums, (d_hidden, d_unembed, unembed_dv[:0])


def _backward(z_loss, soft_cap, chunk, kernels, saved, cotangent):
    d_hidden, d_unembed, like = saved
    g = cotangent.loss
    # In float32: a denominator rounded to bfloat16 would weigh this term up to 0.4 % wrong.
    d_hidden = (d_hidden.astype(jnp.float32) * g).astype(d_hidden.dtype)
    return (d_hidden, (d_unembed * g).astype(like.dtype), None, None)


cross_entropy.defvjp(_forward, _backward)


def distillation(
    hidden_btd: jax.Array,
    unembed_dv: jax.Array,
    teacher_hidden_bte: jax.Array,
    teacher_unembed_ev: jax.Array,
    weights_bt: jax.Array,
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    chunk: int = 0,
    kernels: str = "xla",
) -> jax.Array:
    """Sum over tokens of `w * T^2 * KL(teacher || student)` over the vocabulary, in nats.

    Both vocabularies have the same order; where one table has more (padding) rows, the shorter
    length counts. Logits are recomputed a chunk at a time in the backward pass.
    """
    vocab = min(unembed_dv.shape[1], teacher_unembed_ev.shape[1])
    unembed_dv, teacher_unembed_ev = unembed_dv[:, :vocab], teacher_unembed_ev[:, :vocab]
    chunk = auto_chunk(weights_bt.shape, 2 * vocab, chunk)

    @jax.checkpoint
    def one(hidden, teacher, weights, unembed):
        log_q = jax.nn.log_softmax(_logits(hidden, unembed, soft_cap, kernels) / temperature)
        teacher_logits = _logits(teacher, teacher_unembed_ev, teacher_soft_cap, kernels)
        log_p = jax.lax.stop_gradient(jax.nn.log_softmax(teacher_logits / temperature))
        return jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    def body(total, xs):
        return total + one(*xs, unembed_dv), None

    xs = tuple(_split(x, chunk) for x in (hidden_btd, teacher_hidden_bte, weights_bt))
    return temperature**2 * jax.lax.scan(body, jnp.float32(0), xs)[0]
