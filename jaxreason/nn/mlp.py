"""Gated feed-forward layer."""

import jax
import jax.numpy as jnp

from jaxreason.core.mesh import shard
from jaxreason.core.params import ParamSpec, normal
from jaxreason.nn.kernels import cpu
from jaxreason.nn.linear import linear


def swiglu_specs(d_model: int, d_ff: int, std: float, out_std: float) -> dict[str, ParamSpec]:
    """`gate` and `up` [D,F], `down` [F,D]."""
    return {
        "gate": ParamSpec((d_model, d_ff), ("embed", "mlp"), normal(std)),
        "up": ParamSpec((d_model, d_ff), ("embed", "mlp"), normal(std)),
        "down": ParamSpec((d_ff, d_model), ("mlp", "embed"), normal(out_std)),
    }


def swiglu(p: dict[str, jax.Array], x_btd: jax.Array, kernels: str) -> jax.Array:
    """`(silu(x gate) * (x up)) down` (Shazeer, arXiv 2002.05202)."""
    gate_btf = shard(linear(x_btd, p["gate"], kernels), "batch", "seq", "mlp")
    up_btf = shard(linear(x_btd, p["up"], kernels), "batch", "seq", "mlp")
    if kernels == "cpu":
        hidden_btf = cpu.silu_times(gate_btf, up_btf)
    else:
        gate = gate_btf.astype(jnp.float32)
        hidden_btf = (gate * cpu.sigmoid(gate)).astype(up_btf.dtype) * up_btf
    return linear(hidden_btf, p["down"], kernels)
