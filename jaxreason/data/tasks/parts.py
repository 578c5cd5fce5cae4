"""A task's test examples, told from the others by a hash, so that no run ever sees them."""

import hashlib
from typing import Literal

from jaxreason.core.errors import UserError

Part = Literal["all", "train", "test"]


def belongs(key: str, part: Part, test_fraction: float) -> bool:
    """Whether what is named `key` is in a part; a pure function, so parts never overlap.

    `key` is what must stay together, such as a package; about `test_fraction` of all keys are in
    the part `test`, the others in `train`.
    """
    digest = hashlib.sha256(f"part {key}".encode(errors="backslashreplace")).digest()
    is_test = int.from_bytes(digest[:8]) < test_fraction * 2**64
    return part == "all" or (part == "test") == is_test


def check_fraction(test_fraction: float, task: str) -> None:
    """Raises UserError for a fraction out of range."""
    if not 0 < test_fraction < 1:
        raise UserError(
            f"{task}.test_fraction={test_fraction}, expected 0 < fraction < 1; 0.1 is usual"
        )
