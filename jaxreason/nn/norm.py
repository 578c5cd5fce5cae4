"""Root-mean-square and layer normalisation."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxreason.core.params import ParamSpec, ones, zeros
from jaxreason.nn.kernels import cpu
from jaxreason.nn.linear import sum_rows

Norm = Literal["rms", "layer"]


def norm_specs(kind: Norm, dim: int) -> Any:
    """One scale a channel (rms), or `scale` and `bias` (layer), of the residual stream."""
    if kind == "rms":
        return rms_norm_specs(dim)
    return {"scale": rms_norm_specs(dim), "bias": ParamSpec((dim,), ("embed",), zeros)}


def norm(kind: Norm, x: jax.Array, p: Any, eps: float, kernels: str) -> jax.Array:
    """Normalises over the last axis; statistics in float32, result in `x`'s dtype."""
    if kind == "rms":
        return rms_norm(x, p, eps, kernels)
    return layer_norm(x, p["scale"], p["bias"], eps, kernels)


def rms_norm_specs(dim: int, axis: str | None = "embed") -> ParamSpec:
    """One scale a channel."""
    return ParamSpec((dim,), (axis,), ones)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, kernels: str) -> jax.Array:
    """`x / rms(x) * scale` over the last axis; statistics in float32, result in `x`'s dtype.

    Zhang & Sennrich, arXiv 1910.07467.
    """
    if kernels == "cpu":
        return cpu.rms_norm(x, scale, eps)
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * _wide(scale, x)).astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float, kernels: str
) -> jax.Array:
    """`(x - mean) / std * scale + bias` over the last axis; float32 inside.

    Ba, Kiros & Hinton, arXiv 1607.06450.
    """
    form = _layer_norm_cpu if kernels == "cpu" else _layer_norm
    return form(x, scale, bias, eps)


def _wide(channel, x):
    return channel.astype(jnp.float32)[(None,) * (x.ndim - 1)]


def _standard(x, eps):
    """The standardised values in float32 and one over their standard deviation."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return centred * inverse, inverse


def _layer_norm(x, scale, bias, eps):
    return (_standard(x, eps)[0] * _wide(scale, x) + _wide(bias, x)).astype(x.dtype)


def _layer_norm_backward(eps, saved, g):
    x, scale, bias = saved
    z, inverse = _standard(x, eps)  # Again: what is kept is the input alone.
    g32 = g.astype(jnp.float32)
    d_z = g32 * _wide(scale, x)
    mean = functools.partial(jnp.mean, axis=-1, keepdims=True)
    d_x = inverse * (d_z - mean(d_z) - z * mean(d_z * z))
    d_scale = sum_rows((g32 * z).astype(x.dtype), scale.shape)
    d_bias = sum_rows(g, bias.shape)
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


# Like `cpu.rms_norm`: sums over tokens as products, and one loop over features.
_layer_norm_cpu = jax.custom_vjp(_layer_norm, nondiff_argnums=(3,))
_layer_norm_cpu.defvjp(
    lambda x, scale, bias, eps: (_layer_norm(x, scale, bias, eps), (x, scale, bias)),
    _layer_norm_backward,
)
