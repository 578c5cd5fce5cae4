"""Unified Layer Skipping: the same evenly spread layers for every input (arXiv 2404.06954)."""

from jaxreason.core.errors import UserError


def keep_count(num_layers: int, speedup: float) -> int:
    """Layers that run at a speed-up: `int(L / speedup)` (official code)."""
    return int(num_layers / speedup)


def unified_set(num_layers: int, kept: int) -> tuple[bool, ...]:
    """Whether each of L layers runs when `kept` of them shall (official code, Adaxry).

    The first and the last run, and of those between, in order, each whose number is a multiple of
    `int(L / (kept - 1))`, until there are enough. Below a speed-up of 2 the interval is 1: the set
    is then the model's front and its last layer, which the paper's "evenly" does not say.

    Raises:
      UserError: `kept` is below 2 (the official code divides by zero at 1) or above L.
    """
    if not 2 <= kept <= num_layers:
        raise UserError(
            f"unified skipping of {num_layers} layers cannot keep {kept}; expected 2 (the first "
            f"and the last) to {num_layers}"
        )
    interval = int(num_layers / (kept - 1))
    chosen = {0, num_layers - 1}
    for layer in range(1, num_layers - 1):
        if len(chosen) < kept and layer % interval == 0:
            chosen.add(layer)
    return tuple(layer in chosen for layer in range(num_layers))
