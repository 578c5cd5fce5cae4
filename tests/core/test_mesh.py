"""Meshes over slices and nodes, what cuts what, and which rows a host reads."""

import types

import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

from jaxreason.core.errors import UserError
from jaxreason.core.mesh import (
    ACTIVATION_RULES,
    AXES,
    PARAM_RULES,
    MeshConfig,
    batch_shards,
    check_divides,
    host_rows,
)
from jaxreason.core.params import ParamSpec, zeros
from jaxreason.core.topology import BY_TRAFFIC, lay

ONE = dict.fromkeys(AXES, 1)


def tpus(slices: int, side: int = 2, kind: str = "TPU v5p"):
    """Slices of side x side x 2 chips, hosts of 2 x 2 x 1."""
    chips = [(x, y, z) for z in range(2) for y in range(side) for x in range(side)]
    return [
        types.SimpleNamespace(
            id=s * len(chips) + i, slice_index=s, coords=at, core_on_chip=0, platform="tpu",
            process_index=s * len(chips) // 4 + at[2], device_kind=kind,
        )
        for s in range(slices)
        for i, at in enumerate(chips)
    ]  # fmt: skip


def gpus(nodes: int, each: int, slices: bool = False):
    return [
        types.SimpleNamespace(
            id=i, slice_index=i // each if slices else 0, process_index=i // each,
            platform="gpu", device_kind="NVIDIA H100",
        )
        for i in range(nodes * each)
    ]  # fmt: skip


def crossing(grid: np.ndarray, group: str) -> set[str]:
    """The axes along which the group (slice or process) changes."""
    names = np.vectorize(lambda device: getattr(device, group))(grid)
    return {axis for i, axis in enumerate(BY_TRAFFIC) if np.any(np.diff(names, axis=i))}


@pytest.mark.parametrize(
    ("sizes", "crosses"),
    [({"data": 2, "fsdp": 8}, {"data"}), ({"data": 4, "fsdp": 2, "tensor": 2}, {"data"}),
     ({"data": 2, "sequence": 4, "expert": 2}, {"data"})],
)  # fmt: skip
def test_only_data_crosses_slices(sizes, crosses):
    grid = lay(ONE | sizes, tpus(2))
    assert grid.shape == tuple((ONE | sizes)[name] for name in BY_TRAFFIC)
    assert len({device.id for device in grid.flat}) == 16
    assert crossing(grid, "slice_index") == crosses


def test_fsdp_crosses_slices_only_where_it_may():
    with pytest.raises(UserError, match=r"mesh.data is 1 on 2 slices.*across_slices"):
        lay(ONE | {"fsdp": 16}, tpus(2))
    assert crossing(lay(ONE | {"fsdp": 16}, tpus(2), "fsdp"), "slice_index") == {"fsdp"}
    both = lay(ONE | {"data": 2, "fsdp": 8, "tensor": 2}, tpus(4), "fsdp")
    assert crossing(both, "slice_index") == {"data", "fsdp"}
    for sizes in ({"tensor": 16}, {"sequence": 16}, {"expert": 16}):
        with pytest.raises(UserError, match="make mesh.data a multiple of 2"):
            lay(ONE | sizes, tpus(2), "fsdp")


@pytest.mark.parametrize(("slices", "group"), [(True, "slice_index"), (False, "process_index")])
def test_nodes_of_gpus(slices, group):
    devices = gpus(2, 8, slices)
    assert crossing(lay(ONE | {"data": 2, "tensor": 8}, devices), group) == {"data"}
    assert crossing(lay(ONE | {"fsdp": 16}, devices), group) == {"fsdp"}
    with pytest.raises(UserError, match="on 2 nodes lets an axis beside data and fsdp cross"):
        lay(ONE | {"tensor": 16}, devices)
    # One GPU a process: nobody knows which are on one node.
    assert lay(ONE | {"tensor": 16}, gpus(16, 1)).size == 16


def test_slices_of_different_size_are_refused():
    with pytest.raises(UserError, match="slices or nodes have 4, 8 devices"):
        lay(ONE | {"data": 2, "fsdp": 6}, [*tpus(1), *tpus(2)[8:12]])


def test_tensor_lies_nearest():
    """Chips of one tensor group are neighbours: on one axis of the torus."""
    grid = lay(ONE | {"fsdp": 16, "tensor": 2}, tpus(1, side=4))
    for pair in grid.reshape(-1, 2):
        a, b = (np.array(device.coords) for device in pair)
        assert np.abs(a - b).sum() == 1


def mesh_of(sizes: dict[str, int], devices=None):
    shape = ONE | sizes
    grid = None if devices is None else np.array(devices, object).reshape(tuple(shape.values()))
    return types.SimpleNamespace(shape=shape, axis_names=AXES, devices=grid)


def test_what_cuts_parameters_and_activations():
    mesh = mesh_of({"data": 2, "fsdp": 2, "tensor": 2, "sequence": 2, "expert": 2})
    cut = lambda axes, shape: PARAM_RULES.spec(axes, shape, mesh)  # noqa: E731
    assert cut(("embed", "mlp"), (16, 8)) == Spec(("fsdp", "sequence", "expert"), "tensor")
    # The experts' own dimension keeps the expert axis, wherever it stands.
    assert cut(("expert", "embed", "mlp"), (4, 16, 8)) == Spec(
        "expert", ("fsdp", "sequence"), "tensor"
    )
    # The leading axes that divide: 12 by fsdp and sequence, and not by expert as well.
    assert cut(("embed", None), (12, 3)) == Spec(("fsdp", "sequence"), None)
    act = lambda axes, shape: ACTIVATION_RULES.spec(axes, shape, mesh)  # noqa: E731
    assert act(("batch", "seq", "embed"), (8, 8, 8)) == Spec(
        ("data", "fsdp", "expert"), "sequence", None
    )
    assert act(("expert_batch", "seq", "expert", "mlp"), (4, 8, 2, 8)) == Spec(
        ("data", "fsdp"), "sequence", "expert", "tensor"
    )
    assert batch_shards(mesh) == 8


def test_only_the_axis_that_is_meant_must_divide():
    spec = {"w": ParamSpec((6, 4), ("embed", "mlp"), zeros)}
    check_divides(spec, mesh_of({"fsdp": 2, "sequence": 4}))
    with pytest.raises(UserError, match="w has 6 along embed, mesh.fsdp is 4"):
        check_divides(spec, mesh_of({"fsdp": 4}))
    experts = {"gate": ParamSpec((6, 4, 4), ("expert", "embed", "mlp"), zeros)}
    with pytest.raises(UserError, match="gate has 6 along expert, mesh.expert is 4"):
        check_divides(experts, mesh_of({"expert": 4}))


def test_hosts_read_what_their_devices_hold():
    rows = lambda sizes, devices, i: host_rows(mesh_of(sizes, devices), i)  # noqa: E731
    two = gpus(2, 4)
    assert [rows({"fsdp": 8}, two, i) for i in (0, 1)] == [(0, 2), (1, 2)]
    # Tensor across hosts: both need all rows.
    assert [rows({"tensor": 2, "fsdp": 4}, np.array(two).reshape(2, 4).T, i) for i in (0, 1)] == [
        (0, 1), (0, 1),
    ]  # fmt: skip
    # Hosts of 2 x 2 chips in a 4 x 4 torus: their rows do not lie together.
    blocks = [types.SimpleNamespace(process_index=x // 2 * 2 + y // 2) for x in range(4) for y in range(4)]  # fmt: skip  # noqa: E501
    assert [rows({"fsdp": 16}, blocks, i) for i in range(4)] == [(i, 4) for i in range(4)]
    mixed = [types.SimpleNamespace(process_index=i) for i in (0, 0, 0, 1, 1, 1, 1, 0)]
    with pytest.raises(UserError, match="rows that overlap in part"):
        rows({"fsdp": 4, "tensor": 2}, mixed, 0)


@pytest.mark.parametrize(
    ("cfg", "words"), [({"fsdp": 0}, "mesh.fsdp is 0"), ({"data": -1}, "more than one -1")]
)
def test_numbers_that_mean_nothing(cfg, words):
    with pytest.raises(UserError, match=words):
        MeshConfig(**cfg).validate()
