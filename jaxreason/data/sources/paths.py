"""From a pattern to files, and from a file to its text, local or in a bucket, packed or not."""

import contextlib
import glob
import gzip
import io
import posixpath
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard
from etils import epath

from jaxreason.core.errors import UserError

_ZSTD_READ = 4096  # packed bytes; small, as they are unpacked whole


def expand(path: str) -> list[tuple[str, epath.Path]]:
    """Returns the files that `path` names, each with its id, in the order of the ids.

    `path` is one or more patterns, comma-separated: a file (its name may hold a comma), a folder
    (every file below it; names that start with a dot are left out), or a glob with `*`, `?`, `[]`
    and, locally, `**`. An id is the file's path below the folder that all of them share, so ids do
    not change when a corpus moves.

    Raises:
        UserError: a pattern matches no file.
    """
    patterns = [path] if _is_there(path) else path.split(",")
    found: dict[str, epath.Path] = {}
    for pattern in patterns:
        try:
            files = list(_matches(pattern.strip()))
        except OSError as error:
            raise UserError(
                f"cannot list {pattern.strip()!r} ({error.strerror or error}); "
                "check the path and its rights"
            ) from None
        if not files:
            raise UserError(
                f"no file matches {pattern.strip()!r}, expected a file, a folder or a glob; "
                "check the path"
            )
        found |= {file.as_posix(): file for file in files}
    folders = {posixpath.dirname(name) for name in found}
    root = _common(folders)
    return sorted((posixpath.relpath(name, root), found[name]) for name in found)


def _is_there(path: str) -> bool:
    return bool(path.strip()) and epath.Path(path.strip()).expanduser().exists()


def _matches(pattern: str) -> Iterator[epath.Path]:
    if not pattern:
        return
    path = epath.Path(pattern).expanduser()
    if path.is_dir():
        yield from _below(path)
    elif path.exists():
        yield path
    elif "://" not in pattern:
        for name in glob.iglob(str(path), recursive=True):
            file = epath.Path(name)
            if not file.is_dir():
                yield file
    elif glob.has_magic(pattern):
        bucket, _, key = pattern.partition("://")
        if "**" in key:
            raise UserError(
                f"{pattern!r} has `**`, which is not searched in a bucket; "
                "name the folder, which takes every file below it"
            )
        start, *rest = key.split("/", 1)
        if rest:
            yield from (
                f for f in epath.Path(f"{bucket}://{start}").glob(rest[0]) if not f.is_dir()
            )


def _below(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _below(entry)
        else:
            yield entry


def _common(folders: set[str]) -> str:
    try:
        return posixpath.commonpath(folders)
    except ValueError:  # absolute and relative paths together
        return ""


@contextlib.contextmanager
def open_binary(path: epath.Path) -> Iterator[BinaryIO]:
    """Opens a file for reading, unpacked where its name ends in `.gz` or `.zst`.

    Raises:
        UserError: the file cannot be read, or is damaged or cut off; also while it is being read.
    """
    try:
        with path.open("rb") as file:
            if path.name.endswith(".gz"):
                with gzip.open(file, "rb") as unpacked:
                    yield unpacked  # type: ignore[misc]
            elif path.name.endswith(".zst"):
                yield io.BufferedReader(_Zstd(file), 1 << 17)  # type: ignore[arg-type]
            else:
                yield file  # type: ignore[misc]
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UserError(
            f"{str(path)!r} is damaged or cut off ({error}), expected a whole compressed file; "
            "get it anew"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot read {str(path)!r} ({error.strerror or error}); check the file and its rights"
        ) from None


@contextlib.contextmanager
def open_text(path: epath.Path) -> Iterator[io.TextIOBase]:
    """Opens a UTF-8 file, unpacked, line ends as they are.

    Raises:
        UserError: as `open_binary`, and where the file is not UTF-8.
    """
    try:
        with open_binary(path) as file:
            with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
                yield text
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), error) from None


def not_utf8(name: str, error: UnicodeDecodeError) -> UserError:
    """Returns the error for a file or record that is not UTF-8."""
    got = error.object[error.start : error.end].hex(" ")
    return UserError(
        f"{name!r} is not UTF-8 text (bytes {got}: {error.reason}); "
        "convert it, or leave it out of the path"
    )


class _Zstd(io.RawIOBase):
    """Unpacks zstd frames; unlike zstandard's own reader it raises where the last is cut off."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._open = False  # inside a frame
        self._packed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._unpacked:
            packed = self._packed or self._file.read(_ZSTD_READ)
            self._packed = b""
            if not packed:
                if self._open:
                    raise EOFError("the last zstd frame does not end")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._unpacked = self._frame.decompress(packed)
            self._open = not self._frame.eof
            self._packed = self._frame.unused_data if self._frame.eof else b""
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count
