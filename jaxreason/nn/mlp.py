"""Feed-forward layers: gated (SwiGLU) and plain (GELU, ReLU)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxreason.core.mesh import shard
from jaxreason.core.params import ParamSpec, normal, zeros
from jaxreason.nn.kernels import cpu
from jaxreason.nn.linear import add_bias, linear

Mlp = Literal["swiglu", "gelu", "gelu_tanh", "relu"]

# Hendrycks & Gimpel, arXiv 1606.08415, exact and by tanh.
ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def mlp_specs(
    kind: Mlp, d_model: int, d_ff: int, bias: bool, std: float, out_std: float
) -> dict[str, ParamSpec]:
    """`gate` (swiglu alone) and `up` [D,F], `down` [F,D], and a `_bias` of each where asked for."""
    into = ("gate", "up") if kind == "swiglu" else ("up",)
    specs = {name: ParamSpec((d_model, d_ff), ("embed", "mlp"), normal(std)) for name in into}
    specs["down"] = ParamSpec((d_ff, d_model), ("mlp", "embed"), normal(out_std))
    if bias:
        specs |= {f"{name}_bias": ParamSpec((d_ff,), ("mlp",), zeros) for name in into}
        specs["down_bias"] = ParamSpec((d_model,), ("embed",), zeros)
    return specs


def mlp(kind: Mlp, p: dict[str, jax.Array], x_btd: jax.Array, kernels: str) -> jax.Array:
    """The layer on `x` [B,T,D]."""
    if kind == "swiglu":
        gate_btf, up_btf = (shard(y, "batch", "seq", "mlp") for y in _gate_up(p, x_btd, kernels))
        hidden_btf = silu_times(gate_btf, up_btf, kernels)
    else:
        up_btf = shard(_linear(p, "up", x_btd, kernels), "batch", "seq", "mlp")
        hidden_btf = activate(kind, up_btf, kernels)
    return _linear(p, "down", hidden_btf, kernels)


def _gate_up(p, x_btd, kernels):
    """Gate and up [B,T,F]; one product where they lie joined for a token loop."""
    if "gate_up" not in p:
        return tuple(_linear(p, name, x_btd, kernels) for name in ("gate", "up"))
    both = jnp.split(linear(x_btd, p["gate_up"], kernels), 2, axis=-1)
    return tuple(_biased(p, name, y, kernels) for name, y in zip(("gate", "up"), both))


def _linear(p, name, x, kernels):
    return _biased(p, name, linear(x, p[name], kernels), kernels)


def _biased(p, name, y, kernels):
    bias = p.get(f"{name}_bias")
    return y if bias is None else add_bias(y, bias, kernels)


def swiglu(p: dict[str, jax.Array], x_btd: jax.Array, kernels: str) -> jax.Array:
    """`(silu(x gate) * (x up)) down` (Shazeer, arXiv 2002.05202)."""
    return mlp("swiglu", p, x_btd, kernels)


def silu_times(gate: jax.Array, up: jax.Array, kernels: str) -> jax.Array:
    """`silu(gate) * up`, the activation in float32."""
    if kernels == "cpu":
        return cpu.silu_times(gate, up)
    wide = gate.astype(jnp.float32)
    return (wide * cpu.sigmoid(wide)).astype(up.dtype) * up


def activate(kind: str, x: jax.Array, kernels: str) -> jax.Array:
    """An activation by name, in float32 inside; the CPU's form keeps its input alone."""
    return _activate_cpu(kind, x) if kernels == "cpu" else _activate(kind, x)


def _activate(kind, x):
    return ACTIVATIONS[kind](x.astype(jnp.float32)).astype(x.dtype)


_activate_cpu = jax.custom_vjp(_activate, nondiff_argnums=(0,))
_activate_cpu.defvjp(
    lambda kind, x: (_activate(kind, x), x),
    lambda kind, x, g: jax.vjp(functools.partial(_activate, kind), x)[1](g),
)
