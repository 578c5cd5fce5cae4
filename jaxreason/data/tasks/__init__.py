"""Tasks that come with the program: one frozen config a task, whose `examples` lists them."""

import hashlib
import platform
from collections.abc import Sequence

from jaxreason.data.pairs import Example
from jaxreason.data.tasks import gsm_symbolic
from jaxreason.data.tasks.docstrings import Docstrings
from jaxreason.data.tasks.gsm_symbolic import GsmSymbolic

__all__ = ["Docstrings", "GsmSymbolic", "Task", "identity", "sha256"]

Task = Docstrings | GsmSymbolic


def identity(task: Task) -> dict[str, str]:
    """Returns what the examples depend on beside the fields: a package's version, or Python's.

    Raises:
        UserError: the package is not installed.
    """
    if isinstance(task, Docstrings):
        return {"python": platform.python_version()}
    return {"reasoning-gym": gsm_symbolic.version()}


def sha256(found: Sequence[Example]) -> str:
    """Returns a hash of the examples' names, groups and texts, in order."""
    digest = hashlib.sha256()
    for example in found:
        for text in (example.name, example.group, example.prompt, example.completion):
            part = text.encode(errors="surrogatepass")
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
