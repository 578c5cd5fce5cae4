"""Writes and reads the arrays of a pytree through Orbax; the only file that knows Orbax.

A tree is stored flat, as `{"params/layers/wq": array}`, one Orbax folder for each top-level field:
so the parameters can be verified and read without touching the optimiser's moments, and neither
dataclasses nor optax tuples have to exist when the file is read by something else.
"""

import logging
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxreason.core.errors import UserError, nearest

PyTree = Any
_TOP = "top"  # the folder of leaves that are themselves top-level fields, such as the step


class _WithoutOrbax(logging.Filter):
    """Drops Orbax's own log lines: what matters in them is raised, the rest is noise."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_WithoutOrbax())


def flatten(tree: PyTree) -> dict[str, Any]:
    """Returns `{"field/key/0": leaf}`; `None` and empty containers have no leaves.

    Raises:
      ValueError: two leaves share a name (a key that contains `/`), or `tree` is a bare leaf.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name or name in leaves:
            raise ValueError(f"no unique name for the leaf at {jax.tree_util.keystr(path)!r}")
        leaves[name] = leaf
    return leaves


def describe(leaves: dict[str, Any]) -> dict[str, dict]:
    """Returns `{name: {"shape", "dtype", "item"}}`, with `item` the Orbax folder of the leaf.

    Orbax cannot store an array without elements; such a leaf has `item` None and is recreated.

    Raises:
      TypeError: a leaf is a typed PRNG key (store `jax.random.key_data(key)`) or a NumPy array
        of a type that JAX would change (float64 while x64 is off).
    """
    described = {}
    for name, leaf in leaves.items():
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name} is a typed PRNG key: store jax.random.key_data of it")
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise TypeError(f"{name} is {dtype}, which JAX would change")
        field = name.split("/")[0] if "/" in name else _TOP
        item = re.sub(r"[^\w-]", "_", field) if np.size(leaf) else None
        described[name] = {"shape": list(np.shape(leaf)), "dtype": str(dtype), "item": item}
    return described


def start_write(folder: epath.Path, leaves: dict[str, Any], key: str) -> Callable[[], None]:
    """Copies the leaves to the host, starts to write them, and returns what waits for the end.

    When this returns, the caller may overwrite or donate its arrays.

    Args:
      folder: absolute; must not exist yet. It appears under this name when all is written.
      leaves: from `flatten`; sharded arrays are written by all hosts.
      key: names this save in barriers; the same on all hosts and never used before.
    """
    items: dict[str, dict[str, Any]] = {}
    for name, entry in describe(leaves).items():
        if entry["item"]:
            items.setdefault(entry["item"], {})[name] = _host_copy(leaves[name])
    if not items:
        raise ValueError("nothing to save: the state has no arrays")
    options = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=key)
    # Random-looking weights hardly compress (8 % measured), and zstd costs half of the speed.
    handlers: dict[str, Any] = {
        item: ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=options)
        for item in items
    }
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options), **handlers
    )
    writer = ocp.AsyncCheckpointer(handler, multiprocessing_options=options)
    saves: dict[str, Any] = {item: ocp.args.PyTreeSave(tree) for item, tree in items.items()}
    writer.save(folder, args=ocp.args.Composite(**saves))

    def wait() -> None:
        try:
            writer.wait_until_finished()
        finally:
            writer.close()

    return wait


def read(folder: epath.Path, saved: dict[str, dict], abstract: PyTree, prefix: str = "") -> PyTree:
    """Reads the leaves of `abstract` on to its shardings; any mesh and number of hosts will do.

    Args:
      folder: what `start_write` wrote.
      saved: what `describe` said of it.
      abstract: tree of `jax.ShapeDtypeStruct` (or arrays) that passed `check`; a leaf without a
        sharding goes to the first device.
      prefix: name of the subtree in the checkpoint, with a trailing slash.
    """
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    treedef = jax.tree.structure(abstract)
    wanted = _named(abstract, prefix)
    items: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    for name, leaf in wanted.items():
        sharding = getattr(leaf, "sharding", None) or default
        entry = saved[name]
        if entry["item"] is None:
            values[name] = jax.device_put(np.zeros(entry["shape"], entry["dtype"]), sharding)
            continue
        items.setdefault(entry["item"], {})[name] = ocp.ArrayRestoreArgs(
            restore_type=jax.Array,
            sharding=sharding,
            global_shape=tuple(entry["shape"]),
            dtype=jnp.dtype(entry["dtype"]),
        )
    for item, restore_args in items.items():
        handler = ocp.PyTreeCheckpointHandler()
        args = ocp.args.PyTreeRestore(
            item=dict.fromkeys(restore_args, 0), restore_args=restore_args, partial_restore=True
        )
        values |= handler.restore(folder / item, args=args)
        handler.close()
    return jax.tree.unflatten(treedef, [values[name] for name in wanted])


def check(saved: dict[str, dict], abstract: PyTree, what: str, prefix: str = "") -> None:
    """Raises a UserError that names the first leaf in which checkpoint and run differ."""
    wanted = describe(_named(abstract, prefix))
    stored = {name: e for name, e in saved.items() if name.startswith(prefix) or name in wanted}
    if wanted and not stored:
        subtree = prefix.rstrip("/")
        hint = nearest(subtree, sorted({name.split("/")[0] for name in saved}))
        raise UserError(f"{what} holds no {subtree!r}{hint}")
    for name in [*wanted, *(n for n in stored if n not in wanted)]:
        got = _spell(stored[name]) if name in stored else "nothing"
        expected = _spell(wanted[name]) if name in wanted else "nothing"
        if got != expected:
            raise UserError(
                f"{what} is of another model: {name} is {got} in the checkpoint, expected "
                f"{expected}; use the config saved with the checkpoint, or another checkpoint"
            )


def _named(abstract: PyTree, prefix: str) -> dict[str, Any]:
    if prefix and jax.tree.structure(abstract) == jax.tree.structure(0):
        return {prefix.rstrip("/"): abstract}
    return {prefix + name: leaf for name, leaf in flatten(abstract).items()}


def _spell(entry: dict) -> str:
    return f"{entry['dtype']}[{','.join(map(str, entry['shape']))}]"


def _host_copy(leaf: Any) -> Any:
    """Returns what Orbax may read at leisure while the caller donates the original."""
    if not isinstance(leaf, jax.Array):
        return np.array(leaf, dtype=jnp.asarray(leaf).dtype)
    if jax.process_count() > 1 and leaf.is_fully_addressable:
        return np.array(leaf)  # a host's own array: Orbax lets the first host write its copy
    on_cpu = next(iter(leaf.sharding.device_set)).platform == "cpu"
    if on_cpu or "host" in (leaf.sharding.memory_kind or ""):
        # Here "device to host" is no copy but a view of the buffer that is about to be donated.
        return jax.device_put(leaf, leaf.sharding, may_alias=False)
    return leaf  # Orbax copies it to the host before its save() returns
