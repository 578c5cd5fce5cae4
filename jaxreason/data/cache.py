"""Folders that are built once and then only read, by any number of processes at a time.

A folder is written under a temporary name and renamed when complete, with the size of each of its
files in `meta.json`; a reader believes a folder only where every size agrees. So a builder that
dies leaves nothing that is read, builders side by side cost time and nothing else, and a folder
that lost bytes is built again.
"""

import hashlib
import json
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Callable
from typing import Any

from jaxreason.core.errors import UserError

_STALE_SECONDS = 24 * 3600


def cache_root(cache_dir: str) -> pathlib.Path:
    """Returns the folder of all caches: `cache_dir`, $JAXREASON_CACHE or ~/.cache/jaxreason."""
    named = cache_dir or os.environ.get("JAXREASON_CACHE") or "~/.cache/jaxreason"
    return pathlib.Path(named).expanduser()


def key(*parts: Any) -> str:
    """Returns 24 hex digits that name what JSON-like `parts` describe."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:24]


def read(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the meta data of a complete folder, None where it is absent or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        sizes = {name: (folder / name).stat().st_size for name in meta["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return meta if sizes == meta["files"] else None


def build_once(
    folder: pathlib.Path, write: Callable[[pathlib.Path], dict[str, Any]]
) -> dict[str, Any]:
    """Returns the meta data of `folder`, made by `write` first unless it is there and complete.

    write: fills the empty folder it is given and returns what the meta data shall hold.
    """
    meta = read(folder)
    if meta is not None:
        return meta
    temporary = _beside(folder, "building")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _drop_stale(folder)
        temporary.mkdir()
        meta = write(temporary)
        meta["files"] = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")
        return _publish(temporary, folder)
    except OSError as error:  # `write` reads its sources through functions that raise UserError
        raise UserError(
            f"cannot write the cache folder {folder.parent} ({error.strerror or error}), expected "
            "a folder with room and write access; set data.cache_dir or JAXREASON_CACHE"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    for _ in range(8):
        try:
            os.rename(temporary, folder)  # fails where a folder with files in it has the name
        except OSError:
            there = read(folder)
            if there is not None:
                return there  # another process was first
            damaged = _beside(folder, "damaged")
            try:
                os.rename(folder, damaged)
            except FileNotFoundError:
                continue  # another process has just moved it
            shutil.rmtree(damaged, ignore_errors=True)
        meta = read(folder)
        if meta is not None:
            return meta
    raise UserError(
        f"cannot put a complete folder at {folder} in 8 attempts, expected to be its only owner; "
        "remove it and start again"
    )


def _beside(folder: pathlib.Path, what: str) -> pathlib.Path:
    return folder.with_name(f"{folder.name}.{what}-{os.getpid()}-{secrets.token_hex(4)}")


def _drop_stale(folder: pathlib.Path) -> None:
    """Removes what builders of this folder that died a day ago or more left behind."""
    for path in folder.parent.glob(f"{folder.name}.*-*"):
        try:
            newest = max(p.stat().st_mtime for p in (path, *path.iterdir()))
        except OSError:
            continue
        if newest < time.time() - _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
