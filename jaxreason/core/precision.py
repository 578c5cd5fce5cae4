"""Compute precision: one word in the config, resolved once against the device."""

import platform
from typing import Any

import jax
import jax.numpy as jnp

from jaxreason.core.errors import UserError


def cpu_has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (Linux only; else False)."""
    if platform.system() != "Linux":
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            return "amx_bf16" in f.read()
    except OSError:
        return False


def resolve_dtype(name: str, device: Any = None) -> str:
    """Turns `auto` into `bfloat16` or `float32` for a device.

    bfloat16 on TPU, on GPUs of compute capability 8.0 and above and on a CPU with AMX; float32
    elsewhere (a Colab T4 emulates bfloat16 slowly).
    """
    if name in ("float32", "bfloat16"):
        return name
    if name != "auto":
        raise UserError(f"compute_dtype is {name!r}; expected auto, bfloat16 or float32")
    device = device or jax.devices()[0]
    if device.platform == "tpu":
        return "bfloat16"
    if device.platform in ("gpu", "cuda"):
        capability = float(getattr(device, "compute_capability", "0") or 0)
        return "bfloat16" if capability >= 8.0 else "float32"
    return "bfloat16" if device.platform == "cpu" and cpu_has_amx() else "float32"


def as_dtype(name: str):
    """The jax dtype of a resolved name."""
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]
