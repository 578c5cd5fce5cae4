"""Key-value caches: pytrees of per-layer keys and values that are gathered, cut, and branched.

    cache = make_cache(...)                         empty rows
    cache.gather(rows)  .truncate(lengths)          rows repeated or reordered; tokens forgotten
    append(k, v, new_k, new_v, lengths)             one layer's new tokens (inside the forward)
    cache.advance(new_tokens)                       counts them
    branch(cache, parent, prefix_lengths, capacity) rows that continue from prefixes of others

All are differentiable. A forward reads a cache through `layer(i)` and `replace_layers`, and attends
with `nn.cached_attention.attend_to_cache`, so that both kinds of cache work alike.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxreason.core.errors import UserError


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far.

    `k`, `v`: a tuple of L arrays [B,H_kv,S,K], S the capacity in tokens. `lengths` [B]: tokens
    stored. `valid` [L,B]: leading tokens that a layer really stored (fewer where it was skipped).
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    lengths: jax.Array
    valid: jax.Array

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.k[0].shape[2]

    def layer(self, i: int) -> tuple[jax.Array, ...]:
        """What layer `i` attends to."""
        return self.k[i], self.v[i]

    def replace_layers(self, layers: Sequence[tuple[jax.Array, ...]]) -> "KVCache":
        """The cache with every layer's (k, v) as its attention returned them."""
        k, v = zip(*layers, strict=True)
        return dataclasses.replace(self, k=tuple(k), v=tuple(v))

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

    def advance(self, new_tokens: jax.Array, stored: jax.Array | None = None) -> "KVCache":
        """Counts `new_tokens` [B] that every layer appended.

        Or only those layers that `stored` says, a bool [L] for all rows or [L,B] for each. A layer
        that has missed tokens stays where it missed the first: see `require_complete`.
        """
        counted = self.valid == self.lengths[None]
        if stored is not None:
            counted &= stored if stored.ndim == 2 else stored[:, None]
        valid = jnp.where(counted, self.valid + new_tokens[None], self.valid)
        return dataclasses.replace(self, lengths=self.lengths + new_tokens, valid=valid)

    def grow(self, capacity: int) -> "KVCache":
        """The same rows with room for `capacity` tokens, which must not be less than now."""
        pad = ((0, 0), (0, 0), (0, capacity - self.capacity), (0, 0))
        return dataclasses.replace(
            self,
            k=tuple(jnp.pad(k, pad) for k in self.k),
            v=tuple(jnp.pad(v, pad) for v in self.v),
        )


@flax.struct.dataclass
class BranchCache:
    """Rows that continue from prefixes of other rows, which stay where they are.

    Row b sees the first `prefix_lengths[b]` tokens of row `parent[b]` of `prefix` (R rows), then
    its own tokens in `own` (B rows). `fan_out` bounds the branches of one parent.
    """

    prefix: KVCache
    own: KVCache
    parent: jax.Array
    prefix_lengths: jax.Array
    fan_out: int = flax.struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        """Tokens a row can add to its prefix."""
        return self.own.capacity

    @property
    def lengths(self) -> jax.Array:
        """Tokens a row sees [B], the prefix's included: the position of the next token."""
        return self.prefix_lengths + self.own.lengths

    def rank(self) -> jax.Array:
        """A branch's number among those of its parent [B]."""
        same = self.parent[:, None] == self.parent[None, :]
        return jnp.sum(jnp.tril(same, -1), axis=1, dtype=jnp.int32)

    def layer(self, i: int) -> tuple[jax.Array, ...]:
        """What layer `i` attends to: own keys and values, then the prefixes'."""
        return *self.own.layer(i), *self.prefix.layer(i)

    def replace_layers(self, layers: Sequence[tuple[jax.Array, ...]]) -> "BranchCache":
        """The cache with every layer's own (k, v) as its attention returned them."""
        return dataclasses.replace(self, own=self.own.replace_layers(layers))

    def gather(self, rows: jax.Array, fan_out: int | None = None) -> "BranchCache":
        """The branches `rows` [B'], repeated or reordered; traced rows need their `fan_out`."""
        parent = self.parent[rows]
        return BranchCache(
            self.prefix, self.own.gather(rows), parent, self.prefix_lengths[rows],
            _fan_out(parent, fan_out),
        )  # fmt: skip

    def truncate(self, lengths: jax.Array) -> "BranchCache":
        """Forgets what lies beyond `lengths` [B] tokens, the prefix's included."""
        prefix_lengths = jnp.minimum(self.prefix_lengths, lengths)
        own = self.own.truncate(jnp.maximum(lengths - self.prefix_lengths, 0))
        return dataclasses.replace(self, own=own, prefix_lengths=prefix_lengths)

    def advance(self, new_tokens: jax.Array, stored: jax.Array | None = None) -> "BranchCache":
        """Counts `new_tokens` [B] appended by all layers, or those `stored` [L] or [L,B] says."""
        return dataclasses.replace(self, own=self.own.advance(new_tokens, stored))

    def copied(self, capacity: int) -> KVCache:
        """The branches as rows of their own with room for `capacity` tokens; copies the prefix."""
        rows = self.prefix.gather(self.parent).truncate(self.prefix_lengths)
        rows = rows.grow(max(capacity, rows.capacity))
        at = rows.lengths
        own = zip(rows.k, rows.v, self.own.k, self.own.v)
        layers = [append(a, b, k.swapaxes(1, 2), v.swapaxes(1, 2), at) for a, b, k, v in own]
        rows = rows.replace_layers(layers)
        whole = rows.valid == at[None]
        return dataclasses.replace(
            rows,
            lengths=at + self.own.lengths,
            valid=jnp.where(whole, at[None] + self.own.valid, rows.valid),
        )


def make_cache(
    num_layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype
) -> KVCache:
    """An empty cache."""
    shape = (batch, kv_heads, capacity, head_dim)
    return KVCache(
        tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((num_layers, batch), jnp.int32),
    )


def branch(
    prefix: KVCache,
    parent: jax.Array | np.ndarray,
    prefix_lengths: jax.Array | np.ndarray,
    capacity: int,
    fan_out: int | None = None,
) -> BranchCache:
    """Branches that continue from the first `prefix_lengths` [B] tokens of rows `parent` [B].

    Each can add `capacity` tokens of its own. `fan_out`, the most branches of one parent, is
    counted where `parent` is known; under `jit` it is to be given.
    """
    fan_out = _fan_out(parent, fan_out)
    parent = jnp.asarray(parent, jnp.int32)
    _, heads, _, width = prefix.k[0].shape
    own = make_cache(
        len(prefix.k), parent.shape[0], capacity, heads, width, prefix.k[0].dtype
    )  # fmt: skip
    prefix_lengths = jnp.minimum(jnp.asarray(prefix_lengths, jnp.int32), prefix.lengths[parent])
    return BranchCache(prefix, own, parent, prefix_lengths, fan_out)


def _fan_out(parent: jax.Array | np.ndarray, given: int | None) -> int:
    if given is not None:
        return given
    if isinstance(parent, Tracer):
        raise ValueError("the parents of branches are traced here; give fan_out")
    return max(1, int(np.bincount(np.asarray(parent)).max()))


def append(
    k_cache: jax.Array, v_cache: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes one layer's new keys and values [B,T,G,K] at each row's `lengths` [B].

    Tokens that would fall beyond the capacity are dropped; callers check the capacity.
    """
    batch, time = k.shape[:2]
    rows = jnp.arange(batch)[:, None]
    slots = lengths[:, None] + jnp.arange(time)[None, :]
    return (
        k_cache.at[rows, :, slots].set(k.astype(k_cache.dtype), mode="drop"),
        v_cache.at[rows, :, slots].set(v.astype(v_cache.dtype), mode="drop"),
    )


def complete_lengths(
    cache: KVCache | BranchCache, layers: jax.Array | np.ndarray | None = None
) -> jax.Array:
    """The leading tokens [B] that every layer has stored, or every layer of `layers` [L,B] bool.

    `cache.truncate(complete_lengths(cache))` and a forward over the tokens cut off recompute what
    skipped layers miss. `layers` are those that a row will run when it is resumed: what the others
    miss, nobody reads.
    """

    def least(valid, lengths):
        return jnp.where(True if layers is None else layers, valid, lengths[None]).min(axis=0)

    if isinstance(cache, KVCache):
        return least(cache.valid, cache.lengths)
    of_prefix = least(cache.prefix.valid[:, cache.parent], cache.prefix.lengths[cache.parent])
    stored = jnp.minimum(of_prefix, cache.prefix_lengths)
    whole = stored == cache.prefix_lengths
    return jnp.where(whole, stored + least(cache.own.valid, cache.own.lengths), stored)


def require_complete(
    cache: KVCache | BranchCache, layers: jax.Array | np.ndarray | None = None
) -> None:
    """Raises UserError where a layer misses entries that a resumed row would attend to.

    Runs on the host, before a row is resumed with layers that were skipped for some of its tokens.
    `layers` [L,B] bool: those that each row will run (None: all).
    """
    have, need = (np.asarray(x) for x in (complete_lengths(cache, layers), cache.lengths))
    if (have < need).any():
        row = int(np.argmax(have < need))
        raise UserError(
            f"row {row} of the key-value cache has {need[row]} tokens, but some layer stored only "
            f"{have[row]}: truncate to complete_lengths and run the rest again before resuming"
        )
