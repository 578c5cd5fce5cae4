"""Forms of a transformer's parts that XLA's CPU compiler runs fast, bfloat16 products included.

What they obey, as measured on a CPU with AMX (docs/log.md):
- A product of bfloat16 inputs gives a bfloat16 result (oneDNN sums in float32 inside). Asked for
  float32 results, XLA converts the inputs and leaves AMX: 5 to 12 times slower.
- Tokens are one flat axis: forward, dx and dW are then plain matrix products without copies.
- A softmax that nobody differentiates through is one oneDNN call: attention has its own backward.
- Sums over tokens are products with a row of ones; sums over features are float32 reductions.
"""

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30


def sigmoid(x: jax.Array) -> jax.Array:
    """The logistic function as a tanh: half the time of an exponential and a division.

    It also keeps x * sigmoid(x) from a rewrite of XLA's that breaks its gradient (docs/log.md).
    """
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def linear(x: jax.Array, w: jax.Array, inputs: int = 1) -> jax.Array:
    """`x` [B,T,...] times `w` over the last `inputs` axes of x and the first of w."""
    lead, out = x.shape[: x.ndim - inputs], w.shape[inputs:]
    rows = x.reshape(-1, *x.shape[x.ndim - inputs :]).reshape(_size(lead), -1)
    return (rows @ w.reshape(rows.shape[1], -1)).reshape(*lead, *out)


def _size(shape) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def _sum_rows(y_nd: jax.Array) -> jax.Array:
    """Float32 [D]: the sum over rows, as a product (a loop over columns is slow)."""
    return (jnp.ones((16, y_nd.shape[0]), y_nd.dtype) @ y_nd)[0].astype(jnp.float32)


# Attention.


@jax.custom_vjp
def attention(q_bthk: jax.Array, k_btgk: jax.Array, v_btgk: jax.Array, bias_btt: jax.Array):
    """Attention under an additive `bias` [B,T,S]; scores rounded to q's dtype before the softmax.

    Heads of one group share their keys as rows of one product. Returns [B,T,H,K].
    """
    return _attention_forward(q_bthk, k_btgk, v_btgk, bias_btt)[0]


def _group(x, groups):
    """[B,T,H,K] -> [B,G,(H/G)*T,K]."""
    b, t, h, d = x.shape
    x = x.reshape(b, t, groups, h // groups, d).transpose(0, 2, 3, 1, 4)
    return x.reshape(b, groups, h // groups * t, d)


def _ungroup(x, t):
    b, g, rt, d = x.shape
    return x.reshape(b, g, rt // t, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, -1, d)


def _attention_forward(q, k, v, bias):
    t, heads, width = q.shape[1:]
    groups = k.shape[2]
    qg, kg, vg = _group(q, groups), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bgtk,bgsk->bgts", qg, kg) * jnp.asarray(width**-0.5, q.dtype)
    bias = jnp.tile(bias, (1, heads // groups, 1))[:, None].astype(q.dtype)
    probs = jax.nn.softmax(scores + bias, axis=-1)
    return _ungroup(jnp.einsum("bgts,bgsk->bgtk", probs, vg), t), (q, k, v, probs)


def _attention_backward(saved, d_out):
    q, k, v, probs = saved
    t, _, width = q.shape[1:]
    groups = k.shape[2]
    scale = jnp.asarray(width**-0.5, q.dtype)
    qg, kg, vg = _group(q, groups), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    dg = _group(d_out, groups)
    d_probs = jnp.einsum("bgtk,bgsk->bgts", dg, vg).astype(jnp.float32)
    p = probs.astype(jnp.float32)
    # sum(p dp) and not sum(do o): the same number, but of the probabilities as they were rounded.
    d_scores = (p * (d_probs - jnp.sum(p * d_probs, axis=-1, keepdims=True))).astype(q.dtype)
    d_v = jnp.einsum("bgts,bgtk->bgsk", probs, dg)
    d_q = jnp.einsum("bgts,bgsk->bgtk", d_scores, kg) * scale
    d_k = jnp.einsum("bgts,bgtk->bgsk", d_scores, qg) * scale
    return _ungroup(d_q, t), d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3), None


attention.defvjp(_attention_forward, _attention_backward)


# Rotary embedding.


def _rotate(x, cos, sin):
    half = x.shape[-1] // 2
    halves = x.reshape(*x.shape[:-1], 2, half).astype(jnp.float32)
    a, b = halves[..., 0, :], halves[..., 1, :]
    cos, sin = cos[..., :half], sin[..., :half]
    # Stacked, not concatenated: it stays one loop.
    out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-2)
    return out.astype(x.dtype).reshape(x.shape)


@jax.custom_vjp
def apply_rope(x_bthk: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + K/2); tables [B,T,1,K]. The gradient is the opposite rotation."""
    return _rotate(x_bthk, cos, sin)


apply_rope.defvjp(
    lambda x, cos, sin: (_rotate(x, cos, sin), (cos, sin)),
    lambda saved, g: (_rotate(g, saved[0], -saved[1]), None, None),
)


# RMSNorm.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * scale` over the last axis, float32 inside."""
    return _norm_forward(x, scale, eps)[0]


def _norm_forward(x, scale, eps):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    wide = scale.astype(jnp.float32)[(None,) * (x.ndim - 1)]
    return (x32 * inverse * wide).astype(x.dtype), (x, scale, inverse)


def _norm_backward(eps, saved, g):
    x, scale, inverse = saved
    x32, g32 = x.astype(jnp.float32), g.astype(jnp.float32)
    wide = scale.astype(jnp.float32)[(None,) * (x.ndim - 1)]
    inner = jnp.mean(g32 * wide * x32, axis=-1, keepdims=True) * inverse * inverse
    d_x = (inverse * (g32 * wide - x32 * inner)).astype(x.dtype)
    d_scale = _sum_rows((g32 * (x32 * inverse)).astype(x.dtype).reshape(-1, x.shape[-1]))
    return d_x, d_scale.astype(scale.dtype)


rms_norm.defvjp(_norm_forward, _norm_backward)


# SwiGLU.


@jax.custom_vjp
def silu_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up`, float32 inside; keeps only its two inputs for the gradient."""
    return _silu_forward(gate, up)[0]


def _silu_forward(gate, up):
    g = gate.astype(jnp.float32)
    return (g * sigmoid(g) * up.astype(jnp.float32)).astype(gate.dtype), (gate, up)


def _silu_backward(saved, d_out):
    gate, up = saved
    g, u, d = (x.astype(jnp.float32) for x in (gate, up, d_out))
    s = sigmoid(g)
    return (d * u * s * (1 + g * (1 - s))).astype(gate.dtype), (d * g * s).astype(up.dtype)


silu_times.defvjp(_silu_forward, _silu_backward)
