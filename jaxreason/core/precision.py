"""Compute precision: one word in the config, resolved once against the device."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxreason.core.errors import UserError
from jaxreason.core.platform import cpu_has_bfloat16


def resolve_dtype(name: str, device: Any = None) -> str:
    """Turns `auto` into `bfloat16` or `float32` for a device.

    bfloat16 on TPU, on GPUs of compute capability 8.0 and above and on a CPU with AMX or
    AVX512_BF16; float32 elsewhere (a Colab T4 emulates bfloat16 slowly).
    """
    if name in ("float32", "bfloat16"):
        return name
    if name != "auto":
        raise UserError(f"compute_dtype is {name!r}; expected auto, bfloat16 or float32")
    device = device or jax.devices()[0]
    if device.platform == "tpu":
        return "bfloat16"
    if device.platform in ("gpu", "cuda"):
        try:
            capability = float(getattr(device, "compute_capability", "0") or 0)
        except ValueError:  # ROCm names an architecture; those that JAX supports have bfloat16.
            return "bfloat16"
        return "bfloat16" if capability >= 8.0 else "float32"
    return "bfloat16" if device.platform == "cpu" and cpu_has_bfloat16() else "float32"


def as_dtype(name: str):
    """The jax dtype of a resolved name."""
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]
