"""Grouped-query attention over positions and segments: one mask for packing, caches, padding."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from jaxreason.core.errors import UserError
from jaxreason.nn.kernels import cpu

BACKENDS = ("reference", "cpu")


@flax.struct.dataclass
class Mask:
    """Which keys a query sees; made once a step, for all layers.

    Positions and segments [B,T] of queries and [B,S] of keys; `window` in tokens or None. `bias`
    [B,T,S] is the same as numbers to add to the scores, for a backend that reads it.
    """

    q_positions: jax.Array
    kv_positions: jax.Array
    q_segments: jax.Array
    kv_segments: jax.Array
    window: int | None = flax.struct.field(pytree_node=False)
    bias: jax.Array | None = None

    def allowed(self) -> jax.Array:
        """Boolean [B,T,S]: same segment, not in the future, within the window."""
        q, kv = self.q_positions[:, :, None], self.kv_positions[:, None, :]
        seen = (self.q_segments[:, :, None] == self.kv_segments[:, None, :]) & (kv <= q)
        return seen if self.window is None else seen & (q - kv < self.window)


def make_mask(
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    window: int | None,
    backend: str,
    dtype,
) -> Mask:
    """The mask of a batch for a backend; `dtype` is that of the queries."""
    mask = Mask(q_positions, kv_positions, q_segments, kv_segments, window)
    if backend != "cpu":
        return mask
    # Behind a barrier: otherwise XLA makes it again in every layer, in float32.
    bias = jnp.where(mask.allowed(), 0.0, cpu.MASKED).astype(dtype)
    return dataclasses.replace(mask, bias=jax.lax.optimization_barrier(bias))


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
    mask: Mask,
    *,
    soft_cap: float | None = None,
    backend: str,
) -> jax.Array:
    """Attention of queries [B,T,H,K] to keys and values [B,S,G,K], H a multiple of G.

    A query sees the keys of its own segment at positions not after its own. A row without any such
    key (padding) gets the mean of the values and must not be read. Returns [B,T,H,K].
    """
    if backend not in BACKENDS:
        raise UserError(f"attention backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "cpu":
        if soft_cap is not None or mask.bias is None:
            raise UserError(
                "the cpu attention needs its own mask and has no soft cap; use reference"
            )
        return cpu.attention(q_bthk, k_bsgk, v_bsgk, mask.bias)
    return reference_attention(q_bthk, k_bsgk, v_bsgk, mask.allowed(), soft_cap=soft_cap)
