"""What a source's text depends on, found without reading the text."""

import dataclasses
import hashlib
import json
import os
import platform
from typing import Any

from jaxreason.data.sources import ArrayRecords, JsonlFiles, Stdlib, TextFiles, stdlib
from jaxreason.data.sources.paths import expand


def source_identity(source: Any) -> dict[str, Any]:
    """Returns a JSON-like description that changes where the source's documents may have changed.

    For files it covers their names, sizes and dates of change, for the standard library Python's
    version too, for the others (procedural, TFDS) the settings, which determine the text.
    """
    identity: dict[str, Any] = {
        "type": type(source).__name__,
        "settings": dataclasses.asdict(source),
    }
    files = None
    if isinstance(source, Stdlib):
        identity["python"] = platform.python_version()
        files = stdlib.files(source)
    elif isinstance(source, TextFiles | JsonlFiles | ArrayRecords):
        files = expand(source.path)
    if files is not None:
        listing = hashlib.sha256()
        for name, path in files:
            if "://" in str(path):
                stat: Any = path.stat()  # epath's own fields
                size, date = stat.length, stat.mtime
            else:
                stat = os.stat(path)
                size, date = stat.st_size, stat.st_mtime_ns
            listing.update((json.dumps([name, size, date]) + "\n").encode())
        identity |= {"files": len(files), "listing_sha256": listing.hexdigest()}
    return identity
