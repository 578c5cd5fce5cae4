"""Layers at even distances: what "evenly" says, at every rate.

Unified Layer Skipping's official code keeps the front and the last layer wherever fewer than half
of the layers are skipped (depth/unified.py). This is the set that its paper (arXiv 2404.06954)
describes in words, reconstructed: `kept` of L layers at round(i (L - 1) / (kept - 1)).
"""

import dataclasses

from jaxreason.core.errors import UserError
from jaxreason.depth.decision import Scope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evenly:
    """Evenly spread layers, the first and the last among them, for every input (reconstructed)."""

    kept: int = 0
    """Layers that run."""
    scope: Scope = "decode_only"
    """Where layers are skipped."""


def evenly_set(num_layers: int, kept: int) -> tuple[bool, ...]:
    """Whether each of L layers runs when `kept` of them do, at even distances; halves go up.

    So no two of the layers that are left out are neighbours while they are less than half.

    Raises:
      UserError: `kept` is below 2 (the first and the last) or above L.
    """
    if not 2 <= kept <= num_layers:
        raise UserError(
            f"evenly spread layers of {num_layers} cannot be {kept}; expected 2 (the first and the "
            f"last) to {num_layers}"
        )
    gaps = kept - 1
    chosen = {(2 * i * (num_layers - 1) + gaps) // (2 * gaps) for i in range(kept)}
    return tuple(layer in chosen for layer in range(num_layers))
