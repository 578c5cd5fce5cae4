"""Rotary position embedding, with the scalings that released models use."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.nn.kernels import cpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Divides positions by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float = 1.0
    """How many times longer the context becomes."""

    def validate(self) -> None:
        """Raises UserError for a factor that is not positive."""
        _positive(self, "factor")


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

    def validate(self) -> None:
        """Raises UserError for numbers that do not fit together."""
        _positive(self, "factor", "low_freq_factor", "original_context")
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"model.rope_scaling.high_freq_factor is {self.high_freq_factor}; expected more "
                f"than low_freq_factor {self.low_freq_factor}"
            )


Scaling = LinearScaling | Llama3Scaling | None


def _positive(scaling, *names: str) -> None:
    for name in names:
        if not getattr(scaling, name) > 0:
            value = getattr(scaling, name)
            raise UserError(f"model.rope_scaling.{name} is {value}; expected more than 0")


def scaling_from(entry: Any, source: str = "rope_scaling") -> Scaling:
    """The scaling that a Hugging Face `rope_scaling` (or `rope_parameters`) entry describes.

    Raises UserError for a type other than default, linear and llama3, and for numbers missing or
    out of range; `source` names the entry in the message.
    """
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        raise UserError(f"{source} is a {type(entry).__name__}; expected a dictionary or null")
    kind = entry.get("rope_type", entry.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"{source} has type {kind!r}; this program scales RoPE by default, linear or llama3: "
            "use a model whose context was not extended another way"
        )
    names = {"factor": "factor"}
    if kind == "llama3":
        names |= {
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_context": "original_max_position_embeddings",
        }
    numbers: dict[str, Any] = {}
    for ours, theirs in names.items():
        value = entry.get(theirs)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{source} of type {kind} has {theirs} {value!r}; expected a number")
        numbers[ours] = int(value) if ours == "original_context" else float(value)
    scaling = (LinearScaling if kind == "linear" else Llama3Scaling)(**numbers)
    scaling.validate()
    return scaling


def frequencies(head_dim: int, base: float, scaling: Scaling = None) -> np.ndarray:
    """Angular frequencies [head_dim / 2] in radians a token, float64 on the host.

    `head_dim` counts the features that rotate.
    """
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
    """Rotates pairs (i, i + K/2), the layout of Hugging Face weights, in float32.

    K is the tables' width; features of a head beyond it stay as they are (GPT-NeoX).
    """
    width = cos.shape[-1]
    if width < x_bthk.shape[-1]:
        rotated = apply_rope(x_bthk[..., :width], cos, sin, kernels)
        return jnp.concatenate([rotated, x_bthk[..., width:]], axis=-1)
    if kernels == "cpu":
        return cpu.apply_rope(x_bthk, cos, sin)
    x = x_bthk.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + rotated * sin).astype(x_bthk.dtype)
