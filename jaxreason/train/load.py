"""Loads a part of a saved state, such as a teacher's parameters, or the config beside it."""

import os
from collections.abc import Callable
from typing import Any

from etils import epath

from jaxreason.core.errors import UserError
from jaxreason.train import arrays, manifest
from jaxreason.train.hosts import on_first_host

PyTree = Any


def load(
    path: str | os.PathLike, abstract: PyTree, *, subtree: str = "params", step: int | None = None
) -> PyTree:
    """Restores one part of a saved state, such as a teacher's parameters.

    Only the files of that top-level field are verified and read: loading parameters does not read
    the optimiser's moments. A damaged checkpoint is an error and not a reason to take an older
    one, which would be another teacher.

    Args:
      path: a run's folder, its checkpoints folder, or the folder of one checkpoint.
      abstract: tree of `jax.ShapeDtypeStruct` with the shardings wanted.
      subtree: name of the part, with `/` between levels.
      step: which checkpoint; None is the newest complete one.

    Raises:
      UserError: no checkpoint there, a damaged file, or another model.
    """

    def verified() -> str:
        folder = find(path, step)
        _verify(folder, lambda p: not p.startswith(f"{manifest.ARRAYS}/"))
        leaves = manifest.read_meta(folder)["leaves"]
        arrays.check(leaves, abstract, str(folder), f"{subtree}/")
        items = {e["item"] for name, e in leaves.items() if f"{name}/".startswith(f"{subtree}/")}
        parts = tuple(f"{manifest.ARRAYS}/{item}/" for item in items)
        _verify(folder, lambda p: p.startswith(parts))
        return str(folder)

    folder = epath.Path(on_first_host(verified))
    leaves = manifest.read_meta(folder)["leaves"]
    return arrays.read(folder / manifest.ARRAYS, leaves, abstract, f"{subtree}/")


def load_config(path: str | os.PathLike, *, step: int | None = None) -> str:
    """Returns the resolved config, as JSON, that was saved with a checkpoint.

    Args:
      path: a run's folder, its checkpoints folder, or the folder of one checkpoint.
      step: which checkpoint; None is the newest complete one.

    Raises:
      UserError: no checkpoint at `path`, or its config.json is damaged.
    """
    folder = find(path, step)
    _verify(folder, lambda p: p == manifest.CONFIG)
    return (folder / manifest.CONFIG).read_text()


def find(path: str | os.PathLike, step: int | None = None) -> epath.Path:
    """Returns the folder of the newest complete checkpoint at `path`, or of the one of `step`.

    Raises:
      UserError: there is none.
    """
    root = manifest.absolute(path)
    if step is None and manifest.is_complete(root):
        return root
    directory = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    complete = {
        s: manifest.step_folder(directory, s)
        for s in manifest.steps(directory)
        if manifest.is_complete(manifest.step_folder(directory, s))
    }
    if not complete:
        why = "does not exist" if not root.exists() else "holds no complete checkpoint"
        raise UserError(
            f"{root} {why}; expected a run's folder, its checkpoints folder, or the folder of "
            "one checkpoint"
        )
    if step is not None and step not in complete:
        raise UserError(
            f"{directory} holds no complete checkpoint of step {step}; "
            f"there are {', '.join(map(str, complete))}"
        )
    return complete[max(complete) if step is None else step]


def _verify(folder: epath.Path, only: Callable[[str], bool]) -> None:
    try:
        manifest.verify(folder, only)
    except manifest.Damaged as e:
        raise UserError(
            f"{folder} is damaged: {e}; put back a good copy, or name another step"
        ) from e
