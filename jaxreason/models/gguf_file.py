"""GGUF files: metadata and tensors behind a memory map, every count checked against the size.

The `gguf` package turns quantised blocks into numbers; its own reader believes what a file says of
itself, so the header is read here.
"""

import dataclasses
import importlib
import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxreason.core.errors import UserError

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
# The quantised types whose numbers the tests hold against their definition.
QUANTISED = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in the file; its last axis is the one that is contiguous."""

    name: str
    shape: tuple[int, ...]
    kind: str
    raw: np.ndarray

    def read(self) -> np.ndarray:
        """The values: a view where they are stored plainly, float32 where quantised."""
        if self.kind in _PLAIN:
            return self.raw.view(_PLAIN[self.kind]).reshape(self.shape)
        package = load_package()
        rows = self.raw.reshape(*self.shape[:-1], -1)
        kind = package.GGMLQuantizationType[self.kind]
        return package.dequantize(np.ascontiguousarray(rows), kind).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Gguf:
    """A file's metadata and tensors, by name."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def load_package() -> Any:
    """The `gguf` package; UserError where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UserError(
            "reading GGUF needs the gguf package; install it with pip install 'jaxreason[gguf]'"
        ) from None


class _Cursor:
    """Reads little-endian values; running over the end is a ValueError."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def left(self) -> int:
        return self.data.size - self.at

    def take(self, count: int) -> bytes:
        if count > self.left():
            raise ValueError(f"{count} bytes are claimed at byte {self.at} of {self.data.size}")
        self.at += count
        return self.data[self.at - count : self.at].tobytes()

    def scalar(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a value has type {kind}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            letter = _SCALARS[inner]
            size = struct.calcsize("<" + letter)
            dtype = np.dtype(letter).newbyteorder("<")
            return np.frombuffer(self.take(count * size), dtype).tolist()
        if inner != _STRING or count * 8 > self.left():
            raise ValueError(f"an array of {count} values of type {inner}")
        return [self.string() for _ in range(count)]


def open_gguf(path: Path) -> Gguf:
    """Maps a file and reads its header.

    Raises:
      UserError: it is absent, damaged, no GGUF, or has tensors of a type that is not supported.
    """
    load_package()
    try:
        data = np.memmap(path, np.uint8, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a .gguf file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({str(error)[:120]}); get it anew") from None
    try:
        return _read(data, str(path))
    except (ValueError, OverflowError, struct.error) as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is not a sound GGUF file: {why}; get it anew") from None


def _read(data: np.ndarray, where: str) -> Gguf:
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}; expected 2 or 3, little-endian")
    tensor_count, field_count = cursor.scalar("Q"), cursor.scalar("Q")
    if field_count * 13 + tensor_count * 24 > cursor.left():
        raise ValueError(f"it claims {field_count} fields and {tensor_count} tensors")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        name = cursor.string()
        fields[name] = cursor.value(cursor.scalar("I"))
    infos = [_info(cursor) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {str(alignment)[:40]}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise ValueError(f"the tensor {name[:80]!r} is there twice")
        tensors[name] = _tensor(data, where, name, shape, kind, start + offset)
    return Gguf(fields, tensors)


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, axes = cursor.string(), cursor.scalar("I")
    if not 1 <= axes <= 4:
        raise ValueError(f"the tensor {name[:80]!r} has {axes} axes")
    sizes = [cursor.scalar("Q") for _ in range(axes)]
    return name, tuple(reversed(sizes)), cursor.scalar("I"), cursor.scalar("Q")


def _tensor(
    data: np.ndarray, where: str, name: str, shape: tuple[int, ...], kind: int, start: int
) -> Tensor:
    package = load_package()
    try:
        known = package.GGMLQuantizationType(kind)
    except ValueError:
        raise ValueError(f"the tensor {name[:80]!r} has the unknown type {kind}") from None
    if known.name not in (*_PLAIN, *QUANTISED):
        raise UserError(
            f"{where}: the tensor {name[:80]!r} is {known.name}; supported are "
            f"{', '.join((*_PLAIN, *QUANTISED))}"
        )
    block, block_bytes = package.GGML_QUANT_SIZES[known]
    if shape[-1] % block or not all(shape):
        raise ValueError(f"the tensor {name[:80]!r} has shape {list(shape)} in blocks of {block}")
    size = math.prod(shape) // block * block_bytes
    if start + size > data.size:
        raise ValueError(
            f"the tensor {name[:80]!r} claims bytes {start} to {start + size} of {data.size}"
        )
    return Tensor(name, shape, known.name, data[start : start + size])
