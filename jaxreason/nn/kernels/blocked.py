"""Attention by blocks in plain JAX: any platform, any mask, never an array of [T,S].

The softmax of a row is summed block by block with a running maximum (Milakov and Gimelshein,
arXiv 1805.02867; its backward pass as in FlashAttention, arXiv 2205.14135): scores are computed
again from the log-sums that were kept. Held at once: one block of scores [B,H,BLOCK,BLOCK], and for
the whole row what is as large as queries, keys and values. A pair of blocks in which nobody sees
anything (the upper triangle, other documents, beyond the window) is skipped.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxreason.nn.kernels.per_device import per_device
from jaxreason.nn.mask import Mask
from jaxreason.nn.stack import ATTENTION

# Queries and keys of a block.
BLOCK = 512
# Below every score, and finite: a row's maximum is subtracted from it.
LOW = -1e30


def attention(
    q_bthk: jax.Array,
    k_bsgk: jax.Array,
    v_bsgk: jax.Array,
    mask: Mask,
    *,
    soft_cap: float | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Attention [B,T,H,K], softmax in float32; a query that sees no key gets zeros."""

    def run(q, k, v, mask, _):
        # Tied to the queries: a scan over layers takes whatever depends on the mask alone out of
        # its loop, and would so hold what each pair of blocks sees, [T,S] after all.
        q, mask = jax.lax.optimization_barrier((q, mask))
        t, s = q.shape[1], k.shape[1]
        cut_q, cut_kv = min(block, t), min(block, s)
        # Padding sees nothing and is seen by nothing.
        rows = (
            _cut(mask.q_positions, cut_q, 0),
            _cut(mask.kv_positions, cut_kv, 0),
            _cut(mask.q_segments, cut_q, -1),
            _cut(mask.kv_segments, cut_kv, -2),
        )
        groups = k.shape[2]
        q, k, v = _cut(q, cut_q, 0, groups), _cut(k, cut_kv, 0, groups), _cut(v, cut_kv, 0, groups)
        o = _blocked(mask.window, soft_cap, rows, q, k, v)
        return _join(o)[:, :t]

    return per_device(run, q_bthk, k_bsgk, v_bsgk, mask)


def _cut(x: jax.Array, block: int, fill: int, groups: int = 0) -> jax.Array:
    """[B,T] as [n,B,block], or [B,T,H,K] as [n,B,G,H/G,block,K]; the last block is filled up."""
    widths = ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2))
    x = jnp.pad(x, widths, constant_values=fill)
    if not groups:
        return x.reshape(x.shape[0], -1, block).swapaxes(0, 1)
    b, _, heads, width = x.shape
    x = x.reshape(b, -1, block, groups, heads // groups, width)
    return x.transpose(1, 0, 3, 4, 2, 5)


def _join(x_nbgrtk: jax.Array) -> jax.Array:
    """[n,B,G,R,block,K] as [B,T,H,K]."""
    n, b, g, r, t, k = x_nbgrtk.shape
    return x_nbgrtk.transpose(1, 0, 4, 2, 3, 5).reshape(b, n * t, g * r, k)


def _seen(window: int | None, of_q, of_kv) -> jax.Array:
    """Boolean [B,1,1,block,block] of one pair of blocks; of each its positions and segments."""
    (q, q_segment), (kv, kv_segment) = of_q, of_kv
    q, kv = q[:, :, None], kv[:, None, :]
    seen = (q_segment[:, :, None] == kv_segment[:, None, :]) & (kv <= q)
    return (seen if window is None else seen & (q - kv < window))[:, None, None]


def _scores(q, k, soft_cap) -> jax.Array:
    """Float32 [B,G,R,block,block] of scaled queries and keys, bounded by the cap."""
    s = jnp.einsum("bgrtk,bgosk->bgrts", q, k, preferred_element_type=jnp.float32)
    return s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)


def _scale(q: jax.Array) -> jax.Array:
    return q * q.shape[-1] ** -0.5


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(window, soft_cap, rows, q, k, v) -> jax.Array:
    """Outputs [n,B,G,R,block,K] of blocks of queries, and of keys and values with R = 1."""
    return _forward(window, soft_cap, rows, q, k, v)[0]


def _forward(window, soft_cap, rows, q_all, k_all, v_all):
    q_pos, kv_pos, q_seg, kv_seg = rows

    def for_queries(_, block):
        q, *of_q = block
        q = _scale(q)

        def add(carry, block):
            k, v, *of_kv = block
            seen = _seen(window, of_q, of_kv)

            def more(carry):
                top, total, o = carry
                s = jnp.where(seen, _scores(q, k, soft_cap), LOW)
                new = jnp.maximum(top, s.max(axis=-1))
                p = jnp.where(seen, jnp.exp(s - new[..., None]), 0.0)
                old = jnp.exp(top - new)
                o = o * old[..., None] + jnp.einsum(
                    "bgrts,bgosk->bgrtk", p.astype(v.dtype), v, preferred_element_type=jnp.float32
                )
                return new, total * old + p.sum(axis=-1), o

            return jax.lax.cond(seen.any(), more, lambda carry: carry, carry), None

        start = (
            jnp.full(q.shape[:-1], LOW, jnp.float32),
            jnp.zeros(q.shape[:-1], jnp.float32),
            jnp.zeros(q.shape, jnp.float32),
        )
        (top, total, o), _ = jax.lax.scan(add, start, (k_all, v_all, kv_pos, kv_seg))
        total = jnp.where(total == 0, 1.0, total)
        return None, ((o / total[..., None]).astype(q.dtype), top + jnp.log(total))

    outputs = jax.lax.scan(for_queries, None, (q_all, q_pos, q_seg))[1]
    o, log_sum = (checkpoint_name(x, ATTENTION) for x in outputs)
    return o, (rows, q_all, k_all, v_all, o, log_sum)


def _backward(window, soft_cap, saved, d_all):
    rows, q_all, k_all, v_all, o_all, log_sums = saved
    q_pos, kv_pos, q_seg, kv_seg = rows
    # sum over s of p dp, a query.
    inner = jnp.sum(o_all.astype(jnp.float32) * d_all.astype(jnp.float32), axis=-1)

    def for_keys(d_q_all, block):
        k, v, *of_kv = block

        def add(carry, block):
            d_q_all, d_k, d_v = carry
            i, q, d_o, log_sum, inner, *of_q = block
            q = _scale(q)
            seen = _seen(window, of_q, of_kv)

            def more():
                s = _scores(q, k, soft_cap)
                p = jnp.where(seen, jnp.exp(s - log_sum[..., None]), 0.0)
                d_p = jnp.einsum("bgrtk,bgosk->bgrts", d_o, v, preferred_element_type=jnp.float32)
                d_s = p * (d_p - inner[..., None])
                if soft_cap is not None:
                    d_s = d_s * (1 - (s / soft_cap) ** 2)
                d_s, p = d_s.astype(q.dtype), p.astype(q.dtype)
                sums = lambda form, x, y: jnp.einsum(  # noqa: E731
                    form, x, y, preferred_element_type=jnp.float32
                )
                return (
                    sums("bgrts,bgosk->bgrtk", d_s, k),
                    sums("bgrts,bgrtk->bgsk", d_s, q)[:, :, None],
                    sums("bgrts,bgrtk->bgsk", p, d_o)[:, :, None],
                )

            zeros = lambda: tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))  # noqa: E731
            more_q, more_k, more_v = jax.lax.cond(seen.any(), more, zeros)
            # Outside the condition, so that it is written in place.
            d_q_all = d_q_all.at[i].add(more_q)
            return (d_q_all, d_k + more_k, d_v + more_v), None

        start = (d_q_all, jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        blocks = (jnp.arange(len(q_all)), q_all, d_all, log_sums, inner, q_pos, q_seg)
        (d_q_all, d_k, d_v), _ = jax.lax.scan(add, start, blocks)
        return d_q_all, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    start = jnp.zeros(q_all.shape, jnp.float32)
    d_q, (d_k, d_v) = jax.lax.scan(for_keys, start, (k_all, v_all, kv_pos, kv_seg))
    return None, _scale(d_q).astype(q_all.dtype), d_k, d_v


_blocked.defvjp(_forward, _backward)
