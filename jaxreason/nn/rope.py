"""Rotary position embedding, with the scalings that released models use."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.nn.kernels import cpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Divides positions by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float = 1.0
    """How many times longer the context becomes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths are interpolated, short ones kept (official code)."""

    factor: float = 8.0
    """Divisor of the lowest frequencies."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_context / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_context / this are kept."""
    original_context: int = 8192
    """Context length of pretraining, in tokens."""


def frequencies(
    head_dim: int, base: float, scaling: LinearScaling | Llama3Scaling | None = None
) -> np.ndarray:
    """Angular frequencies [head_dim / 2] in radians a token, float64 on the host."""
    freq = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if isinstance(scaling, LinearScaling):
        return freq / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        wavelength = 2 * math.pi / freq
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = (scaling.original_context / wavelength - low) / (high - low)
        smooth = np.clip(smooth, 0.0, 1.0)
        return freq * (smooth + (1 - smooth) / scaling.factor)
    return freq


def rope_tables(positions_bt: jax.Array, freq: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B,T,1,head_dim] in float32, the two halves alike."""
    angles = (
        positions_bt[..., None].astype(jnp.float32) * jnp.asarray(freq, jnp.float32)[None, None]
    )
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_bthk: jax.Array, cos: jax.Array, sin: jax.Array, kernels: str) -> jax.Array:
    """Rotates pairs (i, i + head_dim/2), the layout of Hugging Face weights, in float32."""
    if kernels == "cpu":
        return cpu.apply_rope(x_bthk, cos, sin)
    x = x_bthk.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + rotated * sin).astype(x_bthk.dtype)
