"""Products with weights, and biases, in the form that the platform runs best."""

import math
import string

import jax
import jax.numpy as jnp

from jaxreason.nn.kernels import cpu, decode
from jaxreason.nn.lora import LoraWeight

KERNELS = ("auto", "xla", "cpu")


def resolve_kernels(kernels: str, platform: str | None = None) -> str:
    """`auto` becomes `cpu` on CPUs and `xla` elsewhere; `platform` None means JAX's default.

    Compiling for hardware that is not here names the platform.
    """
    if kernels != "auto":
        return kernels
    return "cpu" if (platform or jax.default_backend()) == "cpu" else "xla"


def linear(
    x: jax.Array, w: jax.Array | decode.OutIn | LoraWeight, kernels: str, inputs: int = 1
) -> jax.Array:
    """Contracts the last `inputs` axes of `x` [B,T,...] with the first of `w`.

    A weight that was laid out for a token loop brings its own product, and so does one with an
    adapter.
    """
    if isinstance(w, decode.OutIn):
        return decode.product(x, w, inputs=inputs)
    if isinstance(w, LoraWeight):
        low = linear(w.drop(x), w.a, kernels, inputs) * w.scale
        return linear(x, w.base, kernels, inputs) + linear(low, w.b, kernels)
    if kernels == "cpu":
        return cpu.linear(x, w, inputs)
    contracted = string.ascii_uppercase[:inputs]
    out = string.ascii_lowercase[2 : 2 + w.ndim - inputs]
    return jnp.einsum(f"ab{contracted},{contracted}{out}->ab{out}", x, w)


def add_bias(y: jax.Array, bias: jax.Array, kernels: str) -> jax.Array:
    """`y` plus `bias`, whose shape is that of `y`'s last axes; in `y`'s dtype.

    The bias' gradient sums over all tokens, in float32: in bfloat16 such a sum stalls at 256 terms.
    """
    return _add_bias_cpu(y, bias) if kernels == "cpu" else _add_bias(y, bias)


def _add_bias(y, bias):
    wide = bias.astype(jnp.float32)[(None,) * (y.ndim - bias.ndim)]
    return (y.astype(jnp.float32) + wide).astype(y.dtype)


_add_bias_cpu = jax.custom_vjp(_add_bias)
_add_bias_cpu.defvjp(
    lambda y, bias: (_add_bias(y, bias), bias),
    lambda bias, g: (g, sum_rows(g, bias.shape).astype(bias.dtype)),
)


def sum_rows(y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The sum over all but the last axes, which have `shape`, in float32 inside.

    A product with ones: a loop over columns is 20 times slower on CPU.
    """
    rows = y.reshape(-1, math.prod(shape))
    return (jnp.ones((16, rows.shape[0]), y.dtype) @ rows)[0].reshape(shape).astype(jnp.float32)
