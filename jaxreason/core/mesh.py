"""Device mesh and sharding rules: five axes from the first day, logical names in between."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxreason.core.errors import UserError
from jaxreason.core.params import path_name

AXES = ("data", "fsdp", "tensor", "sequence", "expert")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Parallelism as five numbers; -1 (in one place at the most) takes the rest of the devices."""

    data: int = 1
    """Copies of the model, each with its part of the batch."""
    fsdp: int = -1
    """Parts into which parameters and moments are cut; the batch is cut the same way."""
    tensor: int = 1
    """Parts of heads, of the feed-forward width and of the vocabulary."""
    sequence: int = 1
    """Parts of the sequence."""
    expert: int = 1
    """Parts of the experts."""

    def validate(self) -> None:
        """Checks signs; the product is checked against the devices by `make_mesh`."""
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise UserError(f"mesh.{name} is {size}; expected a positive number or -1")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise UserError(f"mesh has more than one -1 ({sizes}); leave one axis to take the rest")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes. Two of these, one for parameters and one for activations."""

    batch: tuple[str, ...] = ()
    seq: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    kv_heads: tuple[str, ...] = ()
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()

    def spec(self, axes: Sequence[str | None], shape: Sequence[int], mesh) -> PartitionSpec:
        """The PartitionSpec of an array; an axis that its mesh axes do not divide stays whole."""
        parts = []
        for name, size in zip(axes, shape, strict=True):
            names = getattr(self, name) if name else ()
            total = math.prod(mesh.shape[n] for n in names)
            parts.append(names if names and total > 1 and size % total == 0 else None)
        return PartitionSpec(*parts)


PARAM_RULES = Rules(
    embed=("fsdp",),
    heads=("tensor",),
    kv_heads=("tensor",),
    mlp=("tensor",),
    vocab=("tensor",),
    expert=("expert",),
)
ACTIVATION_RULES = Rules(
    batch=("data", "fsdp"),
    seq=("sequence",),
    heads=("tensor",),
    kv_heads=("tensor",),
    mlp=("tensor",),
    vocab=("tensor",),
    expert=("expert",),
)
_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=ACTIVATION_RULES)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh; raises UserError when the axes do not multiply to the number of devices."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = {name: getattr(cfg, name) for name in AXES}
    known = math.prod(s for s in sizes.values() if s != -1)
    rest = [name for name, size in sizes.items() if size == -1]
    if rest and len(devices) % known == 0:
        sizes[rest[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        shown = " x ".join(f"{n} {s}" for n, s in sizes.items() if s != 1) or "1"
        raise UserError(
            f"mesh {shown} does not divide the {len(devices)} device(s) present; "
            "choose mesh axes whose product is that number, or set one of them to -1"
        )
    shape = tuple(sizes.values())
    types = (AxisType.Auto,) * len(AXES)
    if jax.process_count() == 1 and devices[0].platform == "cpu":
        # Simulated devices have no topology to optimise for.
        return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=types)
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=types)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = ACTIVATION_RULES):
    """Inside, `shard` constrains activations on `mesh` by `rules`; outside it does nothing."""
    token = _rules.set(rules)
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _rules.reset(token)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation's sharding by logical names, one a dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _rules.get().spec(axes, x.shape, mesh))


def param_shardings(specs, mesh: Mesh, rules: Rules = PARAM_RULES):
    """NamedShardings with the structure of a tree of `ParamSpec`s."""
    return jax.tree.map(lambda s: NamedSharding(mesh, rules.spec(s.axes, s.shape, mesh)), specs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch's leading axis; other axes whole (the sequence is cut inside)."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_divides(specs, mesh: Mesh, rules: Rules = PARAM_RULES) -> None:
    """Raises UserError where a parameter's axis cannot be cut into its mesh axes.

    Key and value heads may be fewer than the tensor axis: they stay whole on every device.
    """
    for path, spec in jax.tree_util.tree_leaves_with_path(specs):
        for axis, size in zip(spec.axes, spec.shape, strict=True):
            names = list(getattr(rules, axis)) if axis else []
            total = math.prod(mesh.shape[n] for n in names)
            if size % total and axis != "kv_heads":
                raise UserError(
                    f"parameter {path_name(path)} has {size} along {axis}, mesh.{names[0]} is "
                    f"{total}; choose a mesh.{names[0]} that divides it"
                )


def check_hosts_rows(mesh: Mesh, batch_size: int) -> None:
    """Raises UserError unless each host's devices hold just the block of rows that it reads."""
    hosts = jax.process_count()
    if hosts == 1:
        return
    rows = batch_size // hosts
    first = jax.process_index() * rows
    here: Any = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    slices: list[Any] = [index[0] for index in here if index]
    starts = {part.start or 0 for part in slices}
    stops = {part.stop or batch_size for part in slices}
    if not slices or min(starts) != first or max(stops) != first + rows:
        raise UserError(
            f"on {hosts} hosts the mesh gives host {jax.process_index()} rows "
            f"{min(starts)} to {max(stops)} of the batch, it reads {first} to {first + rows}; make "
            "mesh.data x mesh.fsdp a multiple of the number of hosts"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())
