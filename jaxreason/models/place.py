"""Fills parameters on their devices from tensors in files, one piece at a time.

Every parameter, stacked over layers and experts as it is, is allocated once, in the shards that
its sharding gives the devices of this host. A tensor goes into its place by donated updates in
place, in pieces of about 8 MB that are read from the file's map, moved as they are stored, and
turned and cast on the device. So loading needs little more memory than the parameters themselves,
and a device is sent its own part only.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core.params import ParamSpec

PIECE = 8 << 20
"""Bytes of one piece, as stored."""
Source = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]
"""A leaf's name, the index of its leading axes, and what gives the values there."""


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _update(buffer: jax.Array, piece: jax.Array, starts: jax.Array, order: tuple[int, ...]):
    lead = buffer.ndim - piece.ndim
    piece = piece.transpose(order).astype(buffer.dtype)
    piece = piece.reshape((1,) * lead + piece.shape)
    return jax.lax.dynamic_update_slice(buffer, piece, [starts[i] for i in range(buffer.ndim)])


def fill(
    specs: dict[str, ParamSpec], shardings: dict[str, Any], sources: Iterable[Source], dtype: Any
) -> dict[str, jax.Array]:
    """Returns the parameters by name, with `dtype`; `sources` must cover each of them once.

    Args:
      specs: shapes of the parameters.
      shardings: where they live; each device of this host gets its shard.
      sources: what to put where; arrays of any float type, read when their turn comes.
      dtype: of the parameters.
    """
    buffers: dict[str, dict[Any, jax.Array]] = {}
    regions = {
        name: shardings[name].addressable_devices_indices_map(tuple(spec.shape))
        for name, spec in specs.items()
    }
    for name, spec in specs.items():
        buffers[name] = {
            device: jnp.zeros(_sizes(region, spec.shape), dtype, device=device)
            for device, region in regions[name].items()
        }
    # Each device is filled by itself, whatever mesh the caller has set.
    with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):
        for name, index, read in sources:
            values = read()
            for device, region in regions[name].items():
                bounds = [part.indices(n)[:2] for part, n in zip(region, specs[name].shape)]
                buffer = buffers[name][device]
                for piece, starts, order in _pieces(values, index, bounds):
                    piece = jax.device_put(piece, device)
                    buffer = _update(buffer, piece, np.asarray(starts, np.int32), order)
                    buffer.block_until_ready()  # Or the pieces of a whole model would queue up.
                buffers[name][device] = buffer
    return {
        name: jax.make_array_from_single_device_arrays(
            tuple(spec.shape), shardings[name], list(buffers.pop(name).values())
        )
        for name, spec in specs.items()
    }


def _sizes(region: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(range(*part.indices(n))) for part, n in zip(region, shape))


def _pieces(
    values: np.ndarray, index: tuple[int, ...], bounds: list[tuple[int, int]]
) -> Iterator[tuple[np.ndarray, list[int], tuple[int, ...]]]:
    """The part of `values` within a device's bounds, cut along its slowest axis in memory.

    Yields (piece as stored, where it starts in the device's buffer, the order of axes that turns
    the piece into the parameter's).
    """
    lead = len(index)
    for i, (low, high) in zip(index, bounds[:lead]):
        if not low <= i < high:
            return
    first = [i - low for i, (low, _) in zip(index, bounds)]
    values = values[tuple(slice(low, high) for low, high in bounds[lead:])]
    stored = sorted(range(values.ndim), key=lambda axis: -values.strides[axis])
    order = tuple(stored.index(axis) for axis in range(values.ndim))
    raw = values.transpose(stored)
    rows = raw.shape[0] if raw.ndim else 1
    row_bytes = max(1, raw.nbytes // max(1, rows))
    step = max(1, PIECE // row_bytes)
    for start in range(0, rows, step):
        piece = raw[start : start + step] if raw.ndim else raw
        starts = [0] * values.ndim
        if raw.ndim:
            starts[stored[0]] = start
        yield np.require(piece, requirements=["C", "A"]), [*first, *starts], order
