"""The manifest that turns a folder into a checkpoint: path, size and SHA-256 of every file.

Orbax restores a flipped bit without a word, so nothing is restored before its bytes have been
compared with the manifest. The manifest is the last file written: a folder without it is an
unfinished save. Its own text is checked by being the one and only rendering of what it says.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator

from etils import epath

NAME, META, CONFIG, ARRAYS = "manifest.json", "meta.json", "config.json", "arrays"
_CHUNK = 4 << 20
_THREADS = 8  # hashlib releases the GIL; on a bucket the threads hide the latency


class Damaged(Exception):
    """A checkpoint folder that must not be restored; the message says which file and why."""


class Unfinished(Damaged):
    """A folder without a manifest: a save that never completed."""


def step_folder(directory: epath.Path, step: int) -> epath.Path:
    """Returns the folder of the checkpoint taken after `step` updates."""
    return directory / f"{step:08d}"


def steps(directory: epath.Path) -> list[int]:
    """Returns the steps that have a folder, finished or not, in ascending order."""
    if not directory.exists():
        return []
    found = (p for p in directory.iterdir() if re.fullmatch(r"\d{8,}", p.name) and p.is_dir())
    return sorted(int(p.name) for p in found)


def absolute(path: str | os.PathLike) -> epath.Path:
    """Returns a path that does not depend on the working directory; buckets stay as they are."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def read_meta(folder: epath.Path) -> dict:
    """Returns the content of a checkpoint's meta.json, unverified."""
    return json.loads((folder / META).read_text())


def is_complete(folder: epath.Path) -> bool:
    """Says whether the commit mark is there; it does not say that the files are sound."""
    return (folder / NAME).exists()


def write(folder: epath.Path, step: int) -> None:
    """Hashes every file under `folder` and writes the manifest, which commits the checkpoint."""
    paths = sorted(p for p in _walk(folder) if p != NAME)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda p: _digest(folder / p), paths))
    files = {p: {"size": size, "sha256": sha} for p, (size, sha) in zip(paths, digests)}
    atomic_write(folder / NAME, _render({"step": step, "files": files}))


def read(folder: epath.Path) -> dict:
    """Returns the manifest `{"step": int, "files": {path: {"size", "sha256"}}}`.

    Raises:
      Unfinished: there is none.
      Damaged: its bytes are not what `write` wrote.
    """
    path = folder / NAME
    if not path.exists():
        raise Unfinished(f"{NAME} is missing (an unfinished save)")
    try:
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text)
        sound = _render({"step": content["step"], "files": content["files"]}) == text
    except (ValueError, KeyError, TypeError) as e:
        raise Damaged(f"{NAME} cannot be parsed ({type(e).__name__})") from e
    except OSError as e:
        raise Damaged(f"{NAME} cannot be read ({e.strerror or e})") from e
    if not sound:
        raise Damaged(f"{NAME} does not match its own SHA-256")
    return content


def verify(folder: epath.Path, only: Callable[[str], bool] = lambda path: True) -> dict:
    """Re-reads the files that `only` selects by their relative path and returns the manifest.

    Every file is checked for presence and size before the first one is hashed. Files that the
    manifest does not list are ignored: nothing refers to them.

    Raises:
      Damaged: names the first bad file and what is wrong with it.
    """
    content = read(folder)
    chosen = {p: entry for p, entry in content["files"].items() if only(p)}
    for path, entry in chosen.items():
        try:
            size = (folder / path).stat().length
        except OSError as e:
            raise Damaged(f"{path} is missing") from e
        if size != entry["size"]:
            raise Damaged(f"{path} has {size} bytes instead of {entry['size']}")
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        results = {p: pool.submit(_digest, folder / p) for p in chosen}
        try:
            for path, result in results.items():
                try:
                    _, sha = result.result()
                except OSError as e:
                    raise Damaged(f"{path} cannot be read ({e.strerror or e})") from e
                if sha != chosen[path]["sha256"]:
                    want = chosen[path]["sha256"]
                    raise Damaged(f"{path} has SHA-256 {sha[:12]}... instead of {want[:12]}...")
        finally:
            pool.shutdown(cancel_futures=True)
    return content


def remove(folder: epath.Path) -> None:
    """Deletes a checkpoint; the manifest goes first, so that a half-deleted one is no checkpoint.

    Raises:
      OSError: something under the folder could not be deleted.
    """
    (folder / NAME).unlink(missing_ok=True)
    for attempt in range(5):
        try:
            if folder.exists():
                folder.rmtree()
            return
        except OSError:  # a writer that failed may still be creating files
            if attempt == 4:
                raise


def atomic_write(path: epath.Path, text: str) -> None:
    """Writes a text file under a temporary name, flushes it to the disk and renames it."""
    temporary = path.parent / (path.name + ".tmp")
    with temporary.open("w") as f:
        f.write(text)
        f.flush()
        with contextlib.suppress(AttributeError, ValueError):  # a bucket has no file descriptor
            os.fsync(f.fileno())
    temporary.replace(path)


def _render(content: dict) -> str:
    body = json.dumps(content, indent=0, sort_keys=True)
    own = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps(content | {"sha256": own}, indent=0, sort_keys=True) + "\n"


def _walk(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _digest(path: epath.Path) -> tuple[int, str]:
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            sha.update(chunk)
            size += len(chunk)
    return size, sha.hexdigest()
