"""A document: what every source yields."""

from typing import NamedTuple


class Document(NamedTuple):
    """One text with a name that is unique in its source and the same on every machine."""

    id: str
    """Name: a path below the source's folder, with a line or part number where it needs one."""
    text: str
    """The text, as the source holds it."""
