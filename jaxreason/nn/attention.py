"""Grouped-query attention over positions and segments: one mask for packing, caches, padding."""

import jax
import jax.numpy as jnp

from jaxreason.core.errors import UserError
from jaxreason.nn.kernels import cpu

BACKENDS = ("reference", "cpu")


def attention_mask(
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    window: int | None,
) -> jax.Array:
    """Boolean [B,T,S]: same segment, not in the future, and within `window` tokens where given."""
    q, kv = q_positions[:, :, None], kv_positions[:, None, :]
    mask = (q_segments[:, :, None] == kv_segments[:, None, :]) & (kv <= q)
    return mask if window is None else mask & (q - kv < window)


def reference_attention(
    q_bthk: jax.Array,
    k_bsgk: jax.Array,
    v_bsgk: jax.Array,
    mask_bts: jax.Array,
    *,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention from its definition, softmax in float32; the yardstick of every other backend."""
    b, t, h, d = q_bthk.shape
    groups = k_bsgk.shape[2]
    q = (q_bthk * d**-0.5).reshape(b, t, groups, h // groups, d)
    logits = jnp.einsum("btgrk,bsgk->bgrts", q, k_bsgk, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(mask_bts[:, None, None], logits, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(logits, axis=-1).astype(v_bsgk.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", probs, v_bsgk).reshape(b, t, h, d)


def attention(
    q_bthk: jax.Array,
    k_bsgk: jax.Array,
    v_bsgk: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    window: int | None = None,
    soft_cap: float | None = None,
    backend: str,
) -> jax.Array:
    """Causal attention of queries [B,T,H,K] to keys and values [B,S,G,K], H a multiple of G.

    A query sees the keys of its own segment at positions not after its own. A row without any such
    key (padding) gets the mean of the values and must not be read. Returns [B,T,H,K].
    """
    if backend not in BACKENDS:
        raise UserError(f"attention backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "cpu" and soft_cap is not None:
        raise UserError("the cpu attention has no soft cap; use attention=reference")
    mask = attention_mask(q_positions, kv_positions, q_segments, kv_segments, window)
    if backend == "cpu":
        return cpu.attention(q_bthk, k_bsgk, v_bsgk, jnp.where(mask, 0.0, cpu.MASKED))
    return reference_attention(q_bthk, k_bsgk, v_bsgk, mask, soft_cap=soft_cap)
