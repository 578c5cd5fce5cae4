"""A mixture of experts: top-k routing and three forms of the experts that give the same numbers."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxreason.core.errors import UserError
from jaxreason.core.mesh import shard
from jaxreason.core.params import ParamSpec, normal
from jaxreason.nn.expert_parallel import cuts, expert_parallel
from jaxreason.nn.mlp import silu_times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe:
    """Experts in place of the feed-forward layer, each a SwiGLU of width d_ff (OLMoE)."""

    num_experts: int = 64
    """Experts a layer (paper, OLMoE, arXiv 2409.02060)."""
    top_k: int = 8
    """Experts a token (paper)."""
    normalise_top_k: bool = False
    """Whether the weights of a token's experts are divided by their sum (official code: no)."""
    balance: float = 0.01
    """Weight of the load-balancing loss in training (paper)."""
    router_z: float = 0.001
    """Weight of the squared log-partition of the router in training (paper)."""
    form: Literal["auto", "dense", "grouped", "all_to_all"] = "auto"
    """dense: every expert on every token; grouped: tokens sorted by expert on one device;
    all_to_all: tokens sent to the devices of their experts. auto: all_to_all on a mesh that cuts
    tokens or experts, elsewhere grouped, and dense on a CPU."""
    capacity_factor: float = 0.0
    """Room for tokens between two devices of the expert axis, over that of even routing (Switch
    Transformer, arXiv 2101.03961: 1 to 2). 0 has room for all: none is dropped. Padding takes
    room like any token."""

    def validate(self) -> None:
        """Raises UserError for numbers that do not fit together."""
        if self.num_experts < 1:
            raise UserError(f"model.moe.num_experts is {self.num_experts}; expected at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(
                f"model.moe.top_k is {self.top_k}; expected 1 to model.moe.num_experts "
                f"{self.num_experts}"
            )
        for name in ("balance", "router_z", "capacity_factor"):
            if getattr(self, name) < 0:
                raise UserError(f"model.moe.{name} is {getattr(self, name)}; expected 0 or more")


def moe_specs(
    cfg: Moe, d_model: int, d_ff: int, std: float, out_std: float
) -> dict[str, ParamSpec]:
    """`router` [D,E], `gate` and `up` [E,D,F], `down` [E,F,D]."""
    e = cfg.num_experts
    into = ParamSpec((e, d_model, d_ff), ("expert", "embed", "mlp"), normal(std))
    return {
        # Whole on every device: all of them route.
        "router": ParamSpec((d_model, e), ("embed", None), normal(std)),
        "gate": into,
        "up": into,
        "down": ParamSpec((e, d_ff, d_model), ("expert", "mlp", "embed"), normal(out_std)),
    }


def moe(
    cfg: Moe, p: dict[str, jax.Array], x_btd: jax.Array, kernels: str
) -> tuple[jax.Array, dict[str, Any]]:
    """The experts on `x` [B,T,D], and what the router did.

    The second is `router_logits` [B,T,E] in float32 and `experts` [B,T,k], the chosen ones in
    falling order of probability. No token is dropped and none depends on another, unless there is
    a `capacity_factor`: then `dropped` [B,T] is how many of its experts a token did not reach.

    Raises:
      UserError: a mesh that does not divide the experts or their width; all_to_all on one that
        does not cut the tokens evenly.
    """
    weights, experts, logits = route(cfg, p["router"], x_btd)
    aux = {"router_logits": logits, "experts": experts}
    form, dropped = _form(cfg, x_btd.shape, p["gate"].shape[-1], kernels), None
    if form == "all_to_all":
        y, dropped = expert_parallel(p, x_btd, weights, experts, kernels, cfg.capacity_factor)
    else:
        run = _dense if form == "dense" else _grouped
        y = run(p, x_btd, weights, experts, kernels)
    if cfg.capacity_factor:
        aux["dropped"] = jnp.zeros(experts.shape[:2], jnp.int32) if dropped is None else dropped
    return y, aux


def _form(cfg: Moe, shape: tuple[int, ...], d_ff: int, kernels: str) -> str:
    """The form that `auto` means for tokens of a shape on the mesh."""
    if cfg.form in ("dense", "grouped"):
        return cfg.form
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return "dense" if cfg.form == "auto" and kernels == "cpu" else "grouped"
    for axis, size, name in (
        ("expert", cfg.num_experts, "moe.num_experts"),
        ("tensor", d_ff, "d_ff"),
    ):
        if size % mesh.shape[axis]:
            raise UserError(
                f"model.{name} is {size}, mesh.{axis} is {mesh.shape[axis]}; choose a mesh.{axis} "
                "that divides it"
            )
    if cuts(shape):
        # A sort of all tokens of a batch that is cut would collect them on every device. On CPU
        # the ragged product is no less work than the dense one.
        alone = kernels == "cpu" and mesh.shape["expert"] == 1 and cfg.form == "auto"
        return "dense" if alone else "all_to_all"
    if cfg.form == "auto":
        return "dense"
    raise UserError(
        f"model.moe.form is all_to_all, but the mesh does not cut {shape[0]} x {shape[1]} tokens "
        "evenly; make the batch a multiple of mesh.data x mesh.fsdp x mesh.expert and the sequence "
        "one of mesh.sequence, or choose dense"
    )


def route(
    cfg: Moe, router_de: jax.Array, x_btd: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights [B,T,k] and numbers [B,T,k] of each token's experts, and all logits [B,T,E].

    Float32 throughout: rounded logits would send a token to other experts.
    """
    logits = jnp.einsum(
        "btd,de->bte", x_btd.astype(jnp.float32), router_de.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), cfg.top_k)
    if cfg.normalise_top_k:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, experts, logits


def _dense(p, x_btd, weights_btk, experts_btk, kernels):
    """Every expert on every token, weighted with 0 where it was not chosen: E / k times the work.

    On a mesh, each device of the expert axis has its experts' part of the sum, over the tokens of
    all of them.
    """
    chosen = jax.nn.one_hot(experts_btk, p["gate"].shape[0], dtype=jnp.float32)
    weights_bte = jnp.einsum(
        "btk,btke->bte", weights_btk, chosen, precision=jax.lax.Precision.HIGHEST
    )
    names = ("expert_batch", "seq", "expert", "mlp")
    x_btd, weights_bte = (shard(y, "expert_batch", "seq", None) for y in (x_btd, weights_bte))
    gate = shard(jnp.einsum("btd,edf->btef", x_btd, p["gate"]), *names)
    up = shard(jnp.einsum("btd,edf->btef", x_btd, p["up"]), *names)
    hidden = silu_times(gate, up, kernels) * weights_bte[..., None].astype(gate.dtype)
    return shard(jnp.einsum("btef,efd->btd", hidden, p["down"]), "batch", "seq", "embed")


def _grouped(p, x_btd, weights_btk, experts_btk, kernels):
    """Tokens, once for each of their experts, sorted by expert: one ragged product a matrix."""
    b, t, d = x_btd.shape
    k, flat = experts_btk.shape[-1], experts_btk.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    back = jnp.argsort(order)
    sizes = jnp.bincount(flat, length=p["gate"].shape[0]).astype(jnp.int32)
    pick = lambda x, at: x.at[at].get(unique_indices=True, mode="promise_in_bounds")  # noqa: E731
    copies = jnp.broadcast_to(x_btd.reshape(-1, 1, d), (b * t, k, d)).reshape(-1, d)
    rows = pick(copies, order)
    gate = jax.lax.ragged_dot(rows, p["gate"], sizes)
    up = jax.lax.ragged_dot(rows, p["up"], sizes)
    weights = pick(weights_btk.reshape(-1), order)[:, None].astype(gate.dtype)
    out = jax.lax.ragged_dot(silu_times(gate, up, kernels) * weights, p["down"], sizes)
    out = pick(out, back).reshape(b, t, k, d).astype(jnp.float32)
    return jnp.sum(out, axis=2).astype(x_btd.dtype)
