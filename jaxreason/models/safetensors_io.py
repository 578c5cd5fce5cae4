"""Safetensors files, read as memory maps and written one tensor at a time.

A file is eight bytes (the header's length), the header (JSON: name -> dtype, shape, byte range) and
the tensors' bytes. Nothing in it is code, and nothing that the header claims is believed before it
has been compared with the file's size; the arrays are views of the map, so that reading one costs
no memory of its own.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxreason.core.errors import UserError

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20  # the limit of the reference implementation


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a model's folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    return parse_object(content, str(path))


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """The object that a JSON text holds; UserError where it holds none."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        why = str(error).splitlines()[0][:120]
        raise UserError(f"{where} is not JSON ({why}); get the file anew") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} holds no JSON object; get the file anew")
    return value


def open_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file as read-only views of its memory map.

    Raises:
      UserError: the file is absent or damaged, or its header does not fit its size.
    """
    try:
        data = np.memmap(path, np.uint8, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; get the model's folder anew") from None
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(f"{path} cannot be read ({str(error)[:120]}); get the file anew") from None
    try:
        return dict(_tensors(data))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is not a sound safetensors file: {why}; get it anew") from None


def _tensors(data: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    if data.size < 8:
        raise ValueError(f"it has {data.size} bytes")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(_MAX_HEADER, data.size - 8):
        raise ValueError(f"its header claims {length} bytes, the file has {data.size}")
    header = json.loads(data[8 : 8 + length].tobytes().decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    body = data[8 + length :]
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or entry.get("dtype") not in DTYPES:
            kind = entry.get("dtype") if isinstance(entry, dict) else entry
            raise ValueError(f"tensor {name[:80]!r} has dtype {str(kind)[:40]!r}")
        dtype = np.dtype(DTYPES[entry["dtype"]])
        shape, offsets = entry["shape"], entry["data_offsets"]
        numbers = [*shape, *offsets]
        if len(offsets) != 2 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"tensor {name[:80]!r} has shape {shape} and bytes {offsets}")
        start, stop = offsets
        if stop > body.size or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"tensor {name[:80]!r} {entry['dtype']}{shape} claims bytes {start} to {stop} of "
                f"{body.size}"
            )
        end = max(end, stop)
        yield name, _view(body[start:stop], dtype).reshape(shape)
    if end != body.size:
        raise ValueError(f"its tensors end at byte {end} of {body.size}")


def _view(raw: np.ndarray, dtype: np.dtype) -> np.ndarray:
    # Headers of the reference implementation are padded to 8 bytes; others may not be.
    return raw.view(dtype) if raw.size else np.zeros(0, dtype)


def open_folder(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a model's folder, from one file or from the shards that an index names.

    Raises:
      UserError: there are no safetensors (a pickled `.bin` is never opened), a shard is missing or
        damaged, or the index names tensors that are not there.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    if not index.exists():
        if single.exists():
            return open_file(single)
        pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(
            p.name for p in folder.glob("*.pt*")
        )
        if pickled:
            raise UserError(
                f"{folder} holds {pickled[0]}, a pickle, which could run any code and is never "
                "opened; save the model as safetensors (transformers: save_pretrained) and give "
                "that folder"
            )
        raise UserError(f"{folder} holds no model.safetensors; expected the weights of a model")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise UserError(f"{index} has no weight_map from tensors to files; get the file anew")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names the file {name[:80]!r}; expected a shard beside it")
        shard = open_file(folder / name)
        if twice := next((key for key in shard if key in tensors), None):
            raise UserError(f"{folder}: the tensor {twice[:80]!r} is in two shards; get it anew")
        tensors |= shard
    if lost := next((key for key in places if key not in tensors), None):
        raise UserError(f"{index} names the tensor {lost[:80]!r}, which no shard holds")
    return tensors


Lazy = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]
"""A tensor to be written: name, shape, and what makes its values when its turn comes."""


def write_folder(
    folder: Path, tensors: Iterable[Lazy], dtype: str, shard_bytes: int = 4 << 30
) -> None:
    """Writes tensors one at a time into shards of at most `shard_bytes`, with an index.

    Args:
      folder: exists; the files appear in it as they are written.
      tensors: in the order of the files.
      dtype: `float32`, `bfloat16` or `float16`.
      shard_bytes: a tensor larger than this has a shard of its own.
    """
    kind = np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
    shards: list[list[Lazy]] = [[]]
    size = total = 0
    for tensor in tensors:
        nbytes = math.prod(tensor[1]) * kind.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + nbytes, total + nbytes
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = ["model.safetensors"] if count == 1 else names
    for name, shard in zip(names, shards):
        with (folder / name).open("wb") as file:
            _write(file, shard, kind)
            file.flush()
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())
    if count > 1:
        places = {tensor[0]: name for name, shard in zip(names, shards) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write(file: BinaryIO, tensors: list[Lazy], dtype: np.dtype) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape, _ in tensors:
        stop = start + math.prod(shape) * dtype.itemsize
        entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        header[name], start = entry, stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape, make in tensors:
        value = np.ascontiguousarray(make(), dtype)
        if value.shape != tuple(shape):
            raise ValueError(f"{name} has shape {value.shape}, announced as {tuple(shape)}")
        file.write(value.reshape(-1).view(np.uint8).data)
