"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp

from jaxreason.core.params import ParamSpec, ones
from jaxreason.nn.kernels import cpu


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
    scale = scale.astype(jnp.float32)[(None,) * (x.ndim - 1)]
    return (x32 * inverse * scale).astype(x.dtype)
