"""Lays a mesh over devices: near ones share most, and only data crosses a slow network."""

import math

import numpy as np
from jax.experimental import mesh_utils

from jaxreason.core.errors import UserError

# Mesh axes by what they send, least first: the last gets the nearest neighbours. Gradients once a
# step (data), a layer's weights (fsdp), its tokens (expert), its keys (sequence), and something in
# every product (tensor).
BY_TRAFFIC = ("data", "fsdp", "expert", "sequence", "tensor")


def shown(sizes: dict[str, int]) -> str:
    """Mesh axes for a message, those of size 1 left out."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "1"


def lay(sizes: dict[str, int], devices: list, across_slices: str = "data") -> np.ndarray:
    """The devices as an array with the axes `sizes` in the order of BY_TRAFFIC.

    Raises:
      UserError: slices or nodes of different sizes, or axes that they or the torus would cut.
    """
    by, count = _groups(devices)
    outer = _outer(across_slices, sizes, by, count, devices[0].platform) if count > 1 else {}
    inner = [sizes[name] // outer.get(name, 1) for name in BY_TRAFFIC]
    # Axes of the torus stay whole where they can; on v5e JAX splits them always.
    splits = (True,) if "v5 lite" in devices[0].device_kind.lower() else (False, True)
    for split in splits:
        try:
            if count > 1:
                return mesh_utils.create_hybrid_device_mesh(
                    inner, [outer.get(name, 1) for name in BY_TRAFFIC], devices,
                    process_is_granule=by == "process_index", allow_split_physical_axes=split,
                )  # fmt: skip
            return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=split)
        except NotImplementedError:
            continue
    raise UserError(
        f"mesh {shown(sizes)} cannot be laid on {len(devices)} x {devices[0].device_kind}; choose "
        "axes that are products of the topology's sides"
    )


def _groups(devices: list) -> tuple[str, int]:
    """What tells devices with a fast network apart from the others, and how many groups it makes.

    GPUs carry their slice only where the job has started; a process with several of them is a
    node. One GPU a process says nothing, and counts as one group.
    """
    slices = {getattr(device, "slice_index", 0) for device in devices}
    processes = {device.process_index for device in devices}
    nodes = devices[0].platform == "gpu" and 1 < len(processes) < len(devices)
    by, groups = ("process_index", processes) if len(slices) == 1 and nodes else ("", slices)
    members = [
        sum(getattr(d, by or "slice_index", 0) == group for d in devices) for group in groups
    ]
    if len(set(members)) > 1:
        raise UserError(
            f"the devices' slices or nodes have {', '.join(map(str, sorted(members)))} devices; a "
            "mesh needs as many in each: choose hosts of one kind"
        )
    return by, len(groups)


def _outer(
    across_slices: str, sizes: dict[str, int], by: str, count: int, platform: str
) -> dict[str, int]:
    """How many parts of data and fsdp the network between `count` slices or nodes separates."""
    data = math.gcd(sizes["data"], count)
    fsdp = count // data
    what = "nodes" if by or platform == "gpu" else "slices"
    if sizes["fsdp"] % fsdp:
        raise UserError(
            f"mesh {shown(sizes)} on {count} {what} lets an axis beside data and fsdp cross the "
            f"network between them; make mesh.data a multiple of {count}"
        )
    if fsdp > 1 and what == "slices" and across_slices != "fsdp":
        raise UserError(
            f"mesh.data is {sizes['data']} on {count} {what}, so that fsdp would gather weights "
            f"between them in every layer; make mesh.data a multiple of {count}, or set "
            "mesh.across_slices to fsdp"
        )
    return {"data": data, "fsdp": fsdp}
