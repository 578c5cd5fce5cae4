"""Evenly spread layers, against NumPy's linspace and their own promises."""

import numpy as np
import pytest

from jaxreason.core.errors import UserError
from jaxreason.depth.evenly import evenly_set
from jaxreason.depth.unified import unified_set

SIZES = [(layers, kept) for layers in (2, 5, 12, 30, 32) for kept in range(2, layers + 1)]


def skipped(layers: int, kept: int) -> list[int]:
    return [layer for layer, runs in enumerate(evenly_set(layers, kept)) if not runs]


@pytest.mark.parametrize(("layers", "kept"), SIZES)
def test_it_is_a_rounded_linspace(layers, kept):
    found = np.flatnonzero(evenly_set(layers, kept))
    assert len(found) == kept and found[0] == 0 and found[-1] == layers - 1
    assert np.abs(found - np.linspace(0, layers - 1, kept)).max() <= 0.5 + 1e-9


def test_smollm2():
    assert skipped(30, 24) == [2, 7, 12, 17, 22, 27]
    assert len(skipped(30, 18)) == 12
    # Where the official rule of Unified leaves out one block in front of the last layer.
    unified = [layer for layer, runs in enumerate(unified_set(30, 24)) if not runs]
    assert unified == [23, 24, 25, 26, 27, 28]


def test_no_two_neighbours_are_left_out_below_a_half():
    for layers, kept in SIZES:
        if 2 * kept > layers:
            assert all(b - a > 1 for a, b in zip(skipped(layers, kept), skipped(layers, kept)[1:]))


@pytest.mark.parametrize("kept", [0, 1, 31])
def test_what_cannot_be(kept):
    with pytest.raises(UserError, match="cannot be"):
        evenly_set(30, kept)
