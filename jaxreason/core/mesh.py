"""Device mesh and sharding rules: five axes from the first day, logical names in between."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxreason.core.errors import UserError
from jaxreason.core.params import path_name
from jaxreason.core.topology import BY_TRAFFIC, lay, shown

AXES = ("data", "fsdp", "tensor", "sequence", "expert")
# The axes that cut the rows of a batch.
ROWS = ("data", "fsdp", "expert")


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
    """Parts of the sequence; outside of attention it cuts parameters and moments like fsdp."""
    expert: int = 1
    """Parts of the experts; everything else it cuts like fsdp, the batch too."""
    across_slices: Literal["data", "fsdp"] = "data"
    """What may cross the network between TPU slices: data alone, or fsdp too where data is smaller
    than the number of slices. Between GPU nodes fsdp always may."""

    def validate(self) -> None:
        """Checks signs; the product is checked against the devices by `make_mesh`."""
        sizes = {name: getattr(self, name) for name in AXES}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise UserError(f"mesh.{name} is {size}; expected a positive number or -1")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise UserError(f"mesh has more than one -1 ({sizes}); leave one axis to take the rest")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes. Two of these, one for parameters and one for activations."""

    batch: tuple[str, ...] = ()
    expert_batch: tuple[str, ...] = ()
    seq: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    kv_heads: tuple[str, ...] = ()
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()

    def cut(self, name: str | None, size: int, mesh, used: Sequence[str] = ()) -> tuple[str, ...]:
        """The mesh axes that cut a logical axis: the leading ones that divide it, none twice."""
        names, total = [], 1
        for axis in getattr(self, name) if name else ():
            if mesh.shape[axis] == 1 or axis in used:
                continue
            total *= mesh.shape[axis]
            if size % total:
                break
            names.append(axis)
        return tuple(names)

    def spec(self, axes: Sequence[str | None], shape: Sequence[int], mesh) -> PartitionSpec:
        """The PartitionSpec of an array; a mesh axis cuts the first dimension that asks for it."""
        used, parts = [], []
        for name, size in zip(axes, shape, strict=True):
            names = self.cut(name, size, mesh, used)
            used.extend(names)
            parts.append(names or None)
        return PartitionSpec(*parts)


# Every axis that cuts tokens adds its devices' gradients up anyway. So it cuts the parameters and
# their moments too (ZeRO): a scatter and a gather send what the sum would, and each device keeps
# its part only. Parameters that the experts' own dimension cuts keep expert for that.
# Data is left whole: it may cross slices, where a gather in every layer would wait.
PARAM_RULES = Rules(
    embed=("fsdp", "sequence", "expert"),
    heads=("tensor",),
    kv_heads=("tensor",),
    mlp=("tensor",),
    vocab=("tensor",),
    expert=("expert",),
)
# Expert cuts the batch of all layers: only inside the experts do its devices share tokens. Were the
# batch whole there, each of them would do the same attention. `expert_batch` is the batch of an
# array that also has a dimension of experts, which then has the axis.
ACTIVATION_RULES = Rules(
    batch=ROWS,
    expert_batch=("data", "fsdp"),
    seq=("sequence",),
    heads=("tensor",),
    kv_heads=("tensor",),
    mlp=("tensor",),
    vocab=("tensor",),
    expert=("expert",),
)
_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=ACTIVATION_RULES)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `AXES`, all of them Auto, laid over devices so that near ones share most.

    `devices` are this job's (None: all that JAX sees) or those of a topology that is described and
    not present. Where they are on several slices (TPU) or nodes (GPU), data crosses the network
    between these, then fsdp where `across_slices` or the platform allows, and nothing else does.

    Raises:
      UserError: the axes do not multiply to the devices, or a slice would cut another axis.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {name: getattr(cfg, name) for name in AXES}
    known = math.prod(s for s in sizes.values() if s != -1)
    rest = [name for name, size in sizes.items() if size == -1]
    if rest and len(devices) % known == 0:
        sizes[rest[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh {shown(sizes)} does not divide the {len(devices)} device(s) present; "
            "choose mesh axes whose product is that number, or set one of them to -1"
        )
    if devices[0].platform == "cpu":  # No topology to lay it on: simulated, or one a process.
        grid = np.asarray(devices).reshape(tuple(sizes.values()))
    else:
        grid = lay(sizes, devices, cfg.across_slices).transpose(
            [BY_TRAFFIC.index(name) for name in AXES]
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = ACTIVATION_RULES):
    """Inside, `shard` constrains activations on `mesh` by `rules`; outside it does nothing."""
    token = _rules.set(rules)
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _rules.reset(token)


def shard(x: jax.Array, *axes: str | None, rules: Rules | None = None) -> jax.Array:
    """Constrains an activation's sharding by logical names, one a dimension.

    A gradient is constrained like its parameter with `rules=PARAM_RULES`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = (_rules.get() if rules is None else rules).spec(axes, x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, spec)


def parts(axis: str, size: int) -> int:
    """Into how many parts `shard` cuts an activation's logical axis of `size`; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[name] for name in _rules.get().cut(axis, size, mesh))


def activation_spec(*axes: str | None, shape: Sequence[int]) -> PartitionSpec:
    """How `shard` cuts an array of `shape`, for code that runs on each device's part."""
    return _rules.get().spec(axes, shape, jax.sharding.get_abstract_mesh())


def param_shardings(specs, mesh: Mesh, rules: Rules = PARAM_RULES):
    """NamedShardings with the structure of a tree of `ParamSpec`s."""
    return jax.tree.map(lambda s: NamedSharding(mesh, rules.spec(s.axes, s.shape, mesh)), specs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch's leading axis; other axes whole (the sequence is cut inside)."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut: a (micro-)batch is a multiple of it."""
    return math.prod(mesh.shape[name] for name in ROWS)


def check_divides(specs, mesh: Mesh, rules: Rules = PARAM_RULES) -> None:
    """Raises UserError where a parameter's axis cannot be cut into the mesh axis that is meant.

    It is the first of the rule; further ones cut where they divide. Key and value heads may be
    fewer than the tensor axis: they stay whole on every device.
    """
    for path, spec in jax.tree_util.tree_leaves_with_path(specs):
        for axis, size in zip(spec.axes, spec.shape, strict=True):
            for name in getattr(rules, axis)[:1] if axis and axis != "kv_heads" else ():
                if size % mesh.shape[name]:
                    raise UserError(
                        f"parameter {path_name(path)} has {size} along {axis}, mesh.{name} is "
                        f"{mesh.shape[name]}; choose a mesh.{name} that divides it"
                    )


def host_rows(mesh: Mesh, process_index: int | None = None) -> tuple[int, int]:
    """Which part of the batch's rows a process reads, and how many such parts there are.

    Processes whose devices hold the same rows (cut by tensor or sequence alone) read the same part.
    A part's rows need not lie together in the global batch: a process' devices are where the
    topology puts them, and what a step computes does not depend on the order of rows.

    Raises:
      UserError: two processes' devices share some of their rows and not all.
    """
    process_index = jax.process_index() if process_index is None else process_index
    held: dict[int, set[int]] = {}
    axes = [AXES.index(name) for name in ROWS]
    parts = np.moveaxis(mesh.devices, axes, range(len(ROWS))).reshape(batch_shards(mesh), -1)
    for part, holders in enumerate(parts):
        for device in holders:
            held.setdefault(device.process_index, set()).add(part)
    blocks = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, blocks)) != batch_shards(mesh) or len({*map(len, blocks)}) > 1:
        raise UserError(
            f"mesh {shown(dict(mesh.shape))} gives the {len(held)} hosts rows that overlap in part"
            "; make mesh.data x mesh.fsdp x mesh.expert a multiple or a divisor of the hosts"
        )
    return blocks.index(tuple(sorted(held[process_index]))), len(blocks)


def check_hosts_rows(mesh: Mesh, batch_size: int) -> None:
    """Raises UserError unless the rows are cut evenly and every host reads just what it holds."""
    if batch_size % batch_shards(mesh):
        raise UserError(
            f"data.batch_size {batch_size} is not a multiple of mesh.data x mesh.fsdp x "
            f"mesh.expert = {batch_shards(mesh)}; change one of them"
        )
    host_rows(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())
