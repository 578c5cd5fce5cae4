"""A teacher's states kept on disk, so that a large teacher reads each batch once for all runs.

A frozen teacher gives the same states whenever it sees the same rows. With `teacher.cache_dir` a
batch that is not on disk yet is run through the teacher and saved; every later run on the same rows
(another method's setting, another student) reads it and never runs the teacher.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from jaxreason.core.errors import UserError
from jaxreason.core.outputs import Outputs
from jaxreason.train.phase import FrozenModel, Phase

FINAL = "teacher/final"
Batch = dict[str, np.ndarray]


def fingerprint(params: Any) -> str:
    """SHA-256, in hex, of every parameter's name, type, shape and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()


class CachedTeacher:
    """A frozen model whose states travel in the batch, read from disk where they are there.

    Args:
      model: the teacher; it is loaded to know it, and again where a batch is missing.
      directory: where the states are kept, local or in a bucket; 2 bytes a token and feature in
        bfloat16, 4 in float32, for each state asked for.
      captures: the layers whose states the objective reads, besides the state after the final norm.
      needs_logits: whether the objective reads the teacher's output matrix too.
      identity: what the teacher computes beside its parameters (its settings; the name of a
        factory, whose changed code is not seen).
      rows: what it reads: corpus, tokenizer, plan, batch, and the compute precision.

    Raises:
      UserError: with several hosts, whose batches are put together from parts.
    """

    def __init__(
        self,
        model: FrozenModel,
        directory: epath.PathLike,
        *,
        captures: tuple[int, ...],
        needs_logits: bool,
        identity: str,
        rows: str,
    ):
        if jax.process_count() > 1:
            raise UserError("teacher.cache_dir is set with several hosts; it serves one, leave it")
        self._model, self._captures, self._needs_logits = model, captures, needs_logits
        self._root, self._what = epath.Path(directory).expanduser(), f"{identity} {rows} {captures}"
        apply = self._apply = _apply_of(model)
        self._forward = jax.jit(lambda params, batch: apply(params, batch, captures))
        self._params: Any = None

    def _load(self) -> Any:
        if self._params is None:
            self._params = self._model.load()
        return self._params

    @functools.cached_property
    def directory(self) -> epath.Path:
        """The folder of this teacher's states of these rows."""
        what = f"{fingerprint(self._load())} {self._what}"
        return self._root / hashlib.sha256(what.encode()).hexdigest()[:24]

    @functools.cached_property
    def _outline(self) -> Outputs:
        """Static facts of the teacher's outputs: soft cap, forms of the products."""
        return jax.eval_shape(lambda p: self._apply(p, _one_token(), ()), self._load())

    def states(self, step: int, batch: Batch) -> Batch:
        """The teacher's states [B,T,E] of a batch of the host, by their names in the batch."""
        path = self.directory / f"{step:08d}.npz"
        if path.exists() and (known := _read(path)) is not None:
            return known
        outputs = jax.device_get(self._forward(self._load(), batch))
        found = {FINAL: np.asarray(outputs.final)}
        found |= {f"teacher/{k}": np.asarray(outputs.captured[k]) for k in self._captures}
        _write(path, found)
        return found

    def extend(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        """Adds the states to batches as they come."""
        try:
            for step, batch in batches:
                yield step, batch | self.states(step, batch)
        finally:
            self._params = None  # The teacher leaves with its phase.

    def frozen(self) -> FrozenModel:
        """The model that a training step sees: it reads its states from the batch."""

        def load():
            _ = self.directory, self._outline  # Both need the teacher.
            kept = {"unembed": _unembed(self._model, self._load())} if self._needs_logits else {}
            self._params = None  # What is on disk needs no teacher; `states` loads it again.
            return kept

        def apply(params: Any, batch: Mapping[str, Any], capture: tuple[int, ...]) -> Outputs:
            captured = {k: batch[f"teacher/{k}"] for k in capture}
            return dataclasses.replace(
                self._outline,
                final=batch[FINAL],
                captured=captured,
                unembed=params.get("unembed"),
                aux=None,
            )

        return FrozenModel(load, apply, self._model.forward_flops)


def with_cache(
    phases: tuple[Phase, ...], directory: str, identity: str, rows: str
) -> tuple[tuple[Phase, ...], CachedTeacher | None]:
    """The phases with the first one's teacher cached in `directory`, where one is named.

    `identity` says what the teacher computes, `rows` what it reads and in which precision.
    """
    if not directory or "teacher" not in phases[0].frozen:
        return phases, None
    guided, teacher = phases[0], phases[0].frozen["teacher"]
    cache = CachedTeacher(
        teacher,
        directory,
        captures=guided.objective.frozen_captures["teacher"],
        needs_logits="kl" in guided.objective.coefficients,
        identity=identity,
        rows=rows,
    )
    guided = dataclasses.replace(guided, frozen={**guided.frozen, "teacher": cache.frozen()})
    return (guided, *phases[1:]), cache


def _one_token() -> dict[str, np.ndarray]:
    one = np.ones((1, 1), np.int32)
    batch = {name: one for name in ("tokens", "targets", "segment_ids", "example_id")}
    return batch | {"positions": one * 0, "loss_weights": one.astype(np.float32)}


def _apply_of(model: FrozenModel):
    assert model.apply is not None  # A teacher has a forward of its own.
    return model.apply


def _unembed(model: FrozenModel, params: Any) -> jax.Array:
    """The teacher's output matrix, from a forward over one token."""
    unembed = jax.jit(lambda p: _apply_of(model)(p, _one_token(), ()).unembed)(params)
    if unembed is None:
        raise UserError("the teacher gives no logits; use a method that aligns hidden states (LET)")
    return unembed


def _write(path: epath.Path, arrays: Batch) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # NumPy's format knows no bfloat16: its bits are kept, under a name that says so.
    bits: dict[str, Any] = {
        f"{name}:bfloat16" if a.dtype == ml_dtypes.bfloat16 else name: (
            a.view(np.uint16) if a.dtype == ml_dtypes.bfloat16 else a
        )
        for name, a in arrays.items()
    }
    with temporary.open("wb") as file:
        np.savez(file, **bits)
    temporary.replace(path)


def _read(path: epath.Path) -> Batch | None:
    """The arrays of a file; None where it is damaged, so that it is made again."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            return {
                name.removesuffix(":bfloat16"): (
                    data[name].view(ml_dtypes.bfloat16) if ":" in name else data[name]
                )
                for name in data.files
            }
    except Exception:  # A zip file has many ways to be torn; each member has a checksum.
        return None
