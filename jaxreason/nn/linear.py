"""Products with weights, in the form that the platform runs best."""

import string

import jax
import jax.numpy as jnp

from jaxreason.nn.kernels import cpu

KERNELS = ("auto", "xla", "cpu")


def resolve_kernels(kernels: str, platform: str | None = None) -> str:
    """`auto` becomes `cpu` on CPUs and `xla` elsewhere; `platform` None means JAX's default.

    Compiling for hardware that is not here names the platform.
    """
    if kernels != "auto":
        return kernels
    return "cpu" if (platform or jax.default_backend()) == "cpu" else "xla"


def linear(x: jax.Array, w: jax.Array, kernels: str, inputs: int = 1) -> jax.Array:
    """Contracts the last `inputs` axes of `x` [B,T,...] with the first of `w`."""
    if kernels == "cpu":
        return cpu.linear(x, w, inputs)
    contracted = string.ascii_uppercase[:inputs]
    out = string.ascii_lowercase[2 : 2 + w.ndim - inputs]
    return jnp.einsum(f"ab{contracted},{contracted}{out}->ab{out}", x, w)
