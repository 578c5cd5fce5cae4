"""Attention by a kernel that knows nothing of meshes: every device runs it on its own part.

Rows are cut as the batch is, heads over the tensor axis, queries along the sequence axis. A device
gathers the keys and values of its rows and heads along the sequence, once, where it is written
here; its transpose sums their gradients back into pieces (a reduce-scatter).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxreason.core.mesh import activation_spec, parts
from jaxreason.nn.mask import Mask

# f(q, k, v, mask, shared) -> o, on one device's part.
Kernel = Callable[[jax.Array, jax.Array, jax.Array, Mask, Any], jax.Array]


def sequence_parts(length: int) -> int:
    """Into how many parts `per_device` cuts queries [B,T,H,K] of that T."""
    return 1 if _mesh() is None else parts("seq", length)


def per_device(
    kernel: Kernel,
    q_bthk: jax.Array,
    k_bsgk: jax.Array,
    v_bsgk: jax.Array,
    mask: Mask,
    shared: Any = (),
    shared_specs: Callable[[Any, Any], Any] | None = None,
) -> jax.Array:
    """Runs `kernel(q, k, v, mask, shared)` on each device's rows, heads and queries: [B,T,H,K].

    An axis that its mesh axes do not divide stays whole, and the devices along them do the same
    work. Where the tensor axis cuts the query heads and not the fewer key heads, each key head is
    repeated as often as needed. `shared` is what the kernel needs besides, whole on each device
    unless `shared_specs(mesh, axes that cut T)` says how it is cut.
    """
    mesh = _mesh()
    if mesh is None:
        return kernel(q_bthk, k_bsgk, v_bsgk, mask, shared)
    q_spec = activation_spec("batch", "seq", "heads", None, shape=q_bthk.shape)
    rows, seq, heads, _ = q_spec
    groups = k_bsgk.shape[2]
    repeats = math.lcm(groups, parts("heads", q_bthk.shape[2])) // groups
    if repeats > 1:
        k_bsgk, v_bsgk = (jnp.repeat(x, repeats, axis=2) for x in (k_bsgk, v_bsgk))
    kv_seq = activation_spec("seq", shape=k_bsgk.shape[1:2])[0]
    kv_spec = PartitionSpec(rows, kv_seq, heads, None)
    of_q, of_kv = PartitionSpec(rows, seq), PartitionSpec(rows, None)
    mask = dataclasses.replace(mask, bias=None)
    fields: dict[str, Any] = {"q_positions": of_q, "q_segments": of_q}
    fields |= {"kv_positions": of_kv, "kv_segments": of_kv}
    mask_specs = dataclasses.replace(mask, **fields)
    if shared_specs:
        specs = shared_specs(mesh, seq)
    else:
        specs = jax.tree.map(lambda _: PartitionSpec(), shared)

    def part(q, k, v, mask, shared):
        if kv_seq:
            k, v = (jax.lax.all_gather(x, kv_seq, axis=1, tiled=True) for x in (k, v))
        return kernel(q, k, v, mask, shared)

    # Pallas and cuDNN calls carry no types of replication to check.
    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(q_spec, kv_spec, kv_spec, mask_specs, specs),
        out_specs=q_spec,
        check_vma=False,
    )(q_bthk, k_bsgk, v_bsgk, mask, shared)


def _mesh():
    """The mesh to cut over; None on one device, and inside a part that is one device's already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return None
    return mesh
