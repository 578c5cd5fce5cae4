"""A run goes on with fewer devices: the same bits, and the losses of a run that stayed."""

import json

import pytest
from support import REPO, run_python


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    room = tmp_path_factory.mktemp("moved")
    child = REPO / "tests/fixtures/checkpoint_meshes.py"
    out = run_python(child, str(room), timeout=3000, JAXREASON_CPU_FLAGS="0")
    return json.loads(out.splitlines()[-1])


def test_parameters_and_moments_have_the_same_bits(moved):
    """From fsdp 8 to tensor 2 x fsdp 2 to one device; each holds only its part."""
    assert moved["same_bits"] == [True, True]
    assert moved["pieces"] == [[8, 8], [4, 4], [1, 1]]


def test_the_losses_are_those_of_a_run_that_stayed(moved):
    assert len(moved["losses"]) == 4 and moved["losses"][0] > moved["losses"][-1] + 0.01
    assert moved["losses"] == pytest.approx(moved["straight"], rel=1e-5)
