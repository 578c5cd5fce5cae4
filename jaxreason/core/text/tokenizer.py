"""What a tokenizer is, and the simplest one: bytes."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol

from etils import epath


class Tokenizer(Protocol):
    """Text to token ids and back. Thread-safe; equal fingerprints give equal ids."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the largest id plus one."""
        ...

    @property
    def eos_id(self) -> int:
        """Id that ends a document."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Id that opens a document, or None where the tokenizer has none."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that defines the ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without begin or end of document."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`. Begin, end and ids outside the vocabulary give no text."""
        ...

    def save(self, folder: epath.PathLike) -> object:
        """Writes the tokenizer's files into `folder`; returns the config that loads it there."""
        ...


def sha256_of(*parts: bytes | str | int | bool | None) -> str:
    """Returns the SHA-256, in hex, of the parts, each with its length and type."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(f"{type(part).__name__}:{len(data)}:".encode() + data)
    return digest.hexdigest()


def as_ids(ids: Iterable[int]) -> list[int]:
    """Returns `ids` (a list, or an integer array of one axis) as a list of Python integers."""
    return [int(i) for i in ids]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """UTF-8 bytes as tokens: 256 ids and an end of document. Nothing to train or download."""


class ByteTokenizer:
    """Byte b is id b; id 256 ends a document."""

    vocab_size = 257
    eos_id = 256
    bos_id = None
    fingerprint = sha256_of("bytes", 1)

    def encode(self, text: str) -> list[int]:
        """Returns the UTF-8 bytes of `text`."""
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the bytes of each text."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the bytes among `ids`; what is not UTF-8 shows as U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Returns the bytes among `ids` as they are, valid UTF-8 or not."""
        return bytes(i for i in as_ids(ids) if 0 <= i < 256)

    def save(self, folder: epath.PathLike) -> Bytes:
        """Returns the config; there is nothing to write."""
        del folder
        return Bytes()
