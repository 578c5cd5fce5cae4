"""Attention of new tokens to a key-value cache, and to a branch's shared prefix without a copy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxreason.nn.attention import attention, make_mask, reference_attention
from jaxreason.nn.kernels import decode
from jaxreason.nn.kv_cache import BranchCache, KVCache, append

# Up to so many new tokens a row, the CPU attends as a token loop does (drafts that are verified).
FEW_TOKENS = 32
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def attend_to_cache(
    cache: KVCache | BranchCache,
    positions: jax.Array,
    segments: jax.Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    kernels: str = "xla",
    empty: bool = False,
) -> tuple[Attend, jax.Array]:
    """How a layer attends to `cache` when it is given new tokens.

    `positions` and `segments` [B,T] are the new tokens': in each row those of segment 1 stand first
    and continue from the cache's lengths, padding has segment 0. Returns `attend(q, k, v, layer)`,
    which gives the attention's output [B,T,H,K] and the layer with the new keys and values (`layer`
    is `cache.layer(i)`; hand the results to `cache.replace_layers`), and the tokens written [B].
    Queries of padding get numbers that must not be read. `empty` promises that no row of a
    `KVCache` has a token yet: the new ones then attend to themselves, and are put in as one block.
    """
    written = (segments > 0).sum(axis=1).astype(jnp.int32)
    own = cache if isinstance(cache, KVCache) else cache.own
    slots = jnp.arange(own.capacity, dtype=jnp.int32)[None, None, :]
    first = 0 if isinstance(cache, KVCache) else cache.prefix_lengths[:, None, None]
    seen = _seen(positions, slots + first, (own.lengths + written)[:, None, None] + first, window)

    def attend(q, k, v, layer):
        k_all, v_all = append(layer[0], layer[1], k, v, own.lengths)
        keys, values = (x.astype(q.dtype).swapaxes(1, 2) for x in (k_all, v_all))
        return reference_attention(q, keys, values, seen, soft_cap=soft_cap), (k_all, v_all)

    if isinstance(cache, KVCache):
        if empty:
            return _first_tokens(positions, segments, window, soft_cap, kernels), written
        if positions.shape[1] == 1 and kernels == "cpu":
            return _one_token(own, written, seen, soft_cap), written
        if positions.shape[1] <= FEW_TOKENS and kernels == "cpu":
            return _few_tokens(own, seen, soft_cap), written
        return attend, written

    shared = jnp.arange(cache.prefix.capacity, dtype=jnp.int32)[None, None, :]
    seen_prefix = _seen(positions, shared, cache.prefix_lengths[:, None, None], window)

    def attend_branch(q, k, v, layer):
        k_all, v_all = append(layer[0], layer[1], k, v, own.lengths)
        o = _two_parts(cache, q, layer[2:], (k_all, v_all), seen_prefix, seen, soft_cap)
        return o, (k_all, v_all)

    return attend_branch, written


def _first_tokens(positions, segments, window, soft_cap, kernels: str) -> Attend:
    """The first tokens of all rows, which see nothing but each other."""
    backend = "cpu" if kernels == "cpu" and soft_cap is None else "reference"

    def attend(q, k, v, layer):
        mask = make_mask(
            q_positions=positions, kv_positions=positions, q_segments=segments,
            kv_segments=segments, window=window, backend=backend, dtype=q.dtype,
        )  # fmt: skip
        o = attention(q, k, v, mask, soft_cap=soft_cap, backend=backend)
        return o, tuple(_put_first(to, new) for to, new in zip(layer, (k, v), strict=True))

    return attend


def _put_first(cache_bgsk: jax.Array, new_btgk: jax.Array) -> jax.Array:
    new = new_btgk.swapaxes(1, 2).astype(cache_bgsk.dtype)
    return jax.lax.dynamic_update_slice(cache_bgsk, new, (0, 0, 0, 0))


def _one_token(cache: KVCache, written: jax.Array, seen: jax.Array, soft_cap) -> Attend:
    """The CPU's form of a token loop's step."""
    # Once for all layers. A row whose token is padding writes nothing.
    bias = jax.lax.optimization_barrier(jnp.where(seen[:, 0], 0.0, jnp.finfo(jnp.float32).min))
    at = decode.places(jnp.where(written > 0, cache.lengths, cache.capacity))

    def attend(q, k, v, layer):
        k_all, v_all = decode.append(layer[0], layer[1], k[:, 0], v[:, 0], at)
        return decode.attend(q[:, 0], k_all, v_all, bias, soft_cap)[:, None], (k_all, v_all)

    return attend


def _few_tokens(cache: KVCache, seen: jax.Array, soft_cap) -> Attend:
    """The CPU's form of a few tokens behind a long cache, which is read where it lies.

    The arithmetic is that of `decode.attend`, so that tokens drafted one by one and verified
    together differ by the order of sums alone.
    """
    bias = jax.lax.optimization_barrier(jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min))

    def attend(q, k, v, layer):
        b, t, h, d = q.shape
        k_all, v_all = append(layer[0], layer[1], k, v, cache.lengths)
        if b == 1:  # As in `decode.append`: XLA would write twice and copy the cache.
            k_all, v_all = jax.lax.optimization_barrier((k_all, v_all))
        groups = k_all.shape[1]
        q = (q * jnp.asarray(d**-0.5, q.dtype)).reshape(b, t, groups, h // groups, d)
        keys, values = k_all.astype(q.dtype), v_all.astype(q.dtype)
        scores = jax.lax.optimization_barrier(jnp.einsum("btgrk,bgsk->bgtrs", q, keys))
        scores = scores.astype(jnp.float32)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = scores + bias[:, None, :, None]
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        total = weights.sum(axis=-1, keepdims=True)
        o = jnp.einsum("bgtrs,bgsk->bgtrk", weights.astype(q.dtype), values)
        o = (jax.lax.optimization_barrier(o).astype(jnp.float32) / total).astype(q.dtype)
        return o.transpose(0, 2, 1, 3, 4).reshape(b, t, h, d), (k_all, v_all)

    return attend


def _seen(positions: jax.Array, slots: jax.Array, end: jax.Array, window: int | None) -> jax.Array:
    """Boolean [B,T,S]: stored (before `end`), not in the future and within the window."""
    q = positions[:, :, None]
    seen = (slots < end) & (slots <= q)
    return seen if window is None else seen & (q - slots < window)


def _two_parts(cache: BranchCache, q, prefix, own, seen_prefix, seen_own, soft_cap) -> jax.Array:
    """One softmax over a parent's prefix and the row's own tokens.

    The queries of a parent's branches are laid side by side, [R, fan_out * T], so that the prefix
    itself is read where it lies and once a parent.
    """
    b, t, h, d = q.shape
    groups, n, rows = own[0].shape[1], cache.fan_out, cache.prefix.lengths.shape[0]
    parent, rank = cache.parent, cache.rank()
    prefix_k, prefix_v, own_k, own_v = (x.astype(q.dtype) for x in (*prefix, *own))
    q = (q * d**-0.5).reshape(b, t, groups, h // groups, d)

    side = jnp.zeros((rows, n, *q.shape[1:]), q.dtype).at[parent, rank].set(q)
    scores = jnp.einsum("zntgrk,zgsk->zngrts", side, prefix_k, preferred_element_type=jnp.float32)
    own_scores = jnp.einsum("btgrk,bgsk->bgrts", q, own_k, preferred_element_type=jnp.float32)
    scores = jnp.concatenate([scores[parent, rank], own_scores], axis=-1)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    seen = jnp.concatenate([seen_prefix, seen_own], axis=-1)[:, None, None]
    probs = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(
        q.dtype
    )

    split = cache.prefix.capacity
    side = jnp.zeros((rows, n, *probs.shape[1:-1], split), probs.dtype)
    side = side.at[parent, rank].set(probs[..., :split])
    from_prefix = jnp.einsum("zngrts,zgsk->zntgrk", side, prefix_v)[parent, rank]
    from_own = jnp.einsum("bgrts,bgsk->btgrk", probs[..., split:], own_v)
    return (from_prefix + from_own).reshape(b, t, h, d)
