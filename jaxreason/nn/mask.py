"""Which keys a query sees: one mask for packing, caches and padding, made once a step."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from jaxreason.core.mesh import shard
from jaxreason.nn.kernels import cpu


@flax.struct.dataclass
class Mask:
    """Which keys a query sees; made once a step, for all layers.

    Positions and segments [B,T] of queries and [B,S] of keys; `window` in tokens or None. `bias`
    [B,T,S] is the same as numbers to add to the scores, for a backend that reads it.
    `in_row_order` says that queries and keys are the same tokens and that inside a segment
    positions grow by one from token to token: to see no later position is then to see no later
    column of the row, whatever position a segment begins with, and a kernel may skip the upper
    triangle without reading a position.
    """

    q_positions: jax.Array
    kv_positions: jax.Array
    q_segments: jax.Array
    kv_segments: jax.Array
    window: int | None = flax.struct.field(pytree_node=False)
    in_row_order: bool = flax.struct.field(pytree_node=False, default=False)
    bias: jax.Array | None = None

    def allowed(self) -> jax.Array:
        """Boolean [B,T,S]: same segment, not in the future, within the window."""
        q, kv = self.q_positions[:, :, None], self.kv_positions[:, None, :]
        seen = (self.q_segments[:, :, None] == self.kv_segments[:, None, :]) & (kv <= q)
        return seen if self.window is None else seen & (q - kv < self.window)

    def longer(self, queries: int, keys: int) -> "Mask":
        """The mask of rows with so many more tokens at the end: a segment of their own."""
        pad = lambda x, extra, fill: jnp.pad(  # noqa: E731
            x, ((0, 0), (0, extra)), constant_values=fill
        )
        return dataclasses.replace(
            self,
            q_positions=pad(self.q_positions, queries, 0),
            kv_positions=pad(self.kv_positions, keys, 0),
            q_segments=pad(self.q_segments, queries, -1),
            kv_segments=pad(self.kv_segments, keys, -1),
            bias=None,
        )


def pad_rows(x_btnk: jax.Array, extra: int) -> jax.Array:
    """Queries, keys or values with `extra` tokens of zeros at the end, as `Mask.longer` has."""
    return jnp.pad(x_btnk, ((0, 0), (0, extra), (0, 0), (0, 0))) if extra else x_btnk


def make_mask(
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    window: int | None,
    backend: str,
    dtype,
    in_row_order: bool = False,
) -> Mask:
    """The mask of a batch for a backend; `dtype` is that of the queries.

    `in_row_order` is the caller's promise (see `Mask`); the rows of a batch keep it, a key-value
    cache does not.
    """
    mask = Mask(q_positions, kv_positions, q_segments, kv_segments, window, in_row_order)
    if backend != "cpu":
        return mask
    # Behind a barrier: otherwise XLA makes it again in every layer, in float32.
    bias = jnp.where(mask.allowed(), 0.0, cpu.MASKED).astype(dtype)
    bias = shard(bias, "batch", "seq", None)
    return dataclasses.replace(mask, bias=jax.lax.optimization_barrier(bias))
