"""A folder that appears under its name when it is complete, and not at all otherwise."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from jaxreason.core.errors import UserError


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, renamed to it at the end, removed on an error.

    Raises:
      UserError: `path` holds something already, or cannot be written.
    """
    final = Path(os.path.abspath(os.path.expanduser(path)))
    if "://" in os.fspath(path):
        raise UserError(f"{os.fspath(path)} is in a bucket; write to a local folder and copy it")
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise UserError(f"{final} exists already; name a new folder")
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    made = [folder for folder in final.parents if not folder.exists()]
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if final.exists():
            final.rmdir()
        temporary.replace(final)
    except OSError as error:
        _clean(temporary, made)
        where = error.filename or temporary
        raise UserError(f"{where} cannot be written ({error.strerror or error})") from error
    except BaseException:
        _clean(temporary, made)
        raise


def _clean(temporary: Path, made: list[Path]) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    for folder in made:  # innermost first
        with contextlib.suppress(OSError):
            folder.rmdir()
