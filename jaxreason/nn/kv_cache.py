"""Key-value cache: a pytree of per-layer keys and values with lengths and validity."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far.

    `k`, `v`: a tuple of L arrays [B,S,H_kv,K], S the capacity in tokens. `lengths` [B]: tokens
    stored. `valid` [L,B]: tokens that layer really stored (fewer where a layer was skipped).
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    lengths: jax.Array
    valid: jax.Array

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.k[0].shape[1]

    def gather(self, rows: jax.Array) -> "KVCache":
        """The cache of `rows` [B'], repeated or reordered."""
        return KVCache(
            tuple(k[rows] for k in self.k),
            tuple(v[rows] for v in self.v),
            self.lengths[rows],
            self.valid[:, rows],
        )

    def truncate(self, lengths: jax.Array) -> "KVCache":
        """Forgets what lies beyond `lengths` [B]; the bytes stay and are masked."""
        lengths = jnp.minimum(self.lengths, lengths)
        return dataclasses.replace(
            self, lengths=lengths, valid=jnp.minimum(self.valid, lengths[None])
        )

    def advance(self, new_tokens: jax.Array) -> "KVCache":
        """Counts `new_tokens` [B] that every layer appended."""
        return dataclasses.replace(
            self, lengths=self.lengths + new_tokens, valid=self.valid + new_tokens[None]
        )


def make_cache(
    num_layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype
) -> KVCache:
    """An empty cache."""
    shape = (batch, capacity, kv_heads, head_dim)
    return KVCache(
        tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((num_layers, batch), jnp.int32),
    )


def append(
    k_cache: jax.Array, v_cache: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes one layer's new keys and values [B,T,H,K] at each row's `lengths` [B].

    Tokens that would fall beyond the capacity are dropped; callers check the capacity.
    """
    batch, time = k.shape[:2]
    rows = jnp.arange(batch)[:, None]
    slots = lengths[:, None] + jnp.arange(time)[None, :]
    return (
        k_cache.at[rows, slots].set(k.astype(k_cache.dtype), mode="drop"),
        v_cache.at[rows, slots].set(v.astype(v_cache.dtype), mode="drop"),
    )
