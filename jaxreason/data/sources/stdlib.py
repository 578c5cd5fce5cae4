"""The Python standard library's own source code: about 11 MB of text on every machine."""

import dataclasses
import hashlib
import os
import pathlib
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

from jaxreason.core.errors import UserError
from jaxreason.data.sources.document import Document

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
_TESTS = frozenset({"test", "tests", "idle_test"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stdlib:
    """The `.py` files of the running Python's standard library; the text depends on its version."""

    tests: bool = False
    """Whether the library's tests are read too, where they are installed."""


class Summary(NamedTuple):
    """What identifies the library's text."""

    python: str
    """Version of Python."""
    files: int
    """Number of files read."""
    skipped: int
    """Number of files that are not text in the encoding they declare."""
    sha256: str
    """Hash of the names and texts, in order."""


def files(cfg: Stdlib) -> list[tuple[str, pathlib.Path]]:
    """Returns id and path of each file, in the order of the ids.

    Left out: installed packages, and what the build of this Python wrote (`_sysconfigdata*`,
    `config-*`), which names one machine's paths.

    Raises:
        UserError: this Python keeps its library in an archive, or has none.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skip = _LEFT_OUT if cfg.tests else _LEFT_OUT | _TESTS
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in skip and not f.startswith("config-")]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = pathlib.Path(folder, name)
                found.append((path.relative_to(root).as_posix(), path))
    if not found:
        raise UserError(
            f"no source files of Python's standard library in {str(root)!r}; expected .py files; "
            "use a full installation of Python, or another source"
        )
    return sorted(found)


def iter_stdlib(cfg: Stdlib) -> Iterator[Document]:
    """Yields the library's files that are text in the encoding they declare; see `summary`."""
    for name, path in files(cfg):
        text = _read(path)
        if text is not None:
            yield Document(name, text)


def _read(path: pathlib.Path) -> str | None:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):  # SyntaxError: an unknown encoding
        return None


def summary(cfg: Stdlib) -> Summary:
    """Returns what identifies the text: Python's version, files read and skipped, a SHA-256."""
    digest, read, skipped = hashlib.sha256(), 0, 0
    for name, path in files(cfg):
        text = _read(path)
        if text is None:
            skipped += 1
            continue
        read += 1
        for part in (name.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return Summary(platform.python_version(), read, skipped, digest.hexdigest())
