"""Attention on simulated devices that cut the sequence equals attention on one device.

Every backend that runs on this platform, splash in Pallas' interpreter, and cuDNN's calls with
XLA's own attention behind them, inside a decoder: the
loss and the gradient of every parameter.
"""

import json

import pytest
from support import REPO, run_python

SEQUENCE, MIXED = {"sequence": 4}, {"sequence": 2, "tensor": 2}
CASES = {
    "reference, sequence 4": (SEQUENCE, {"attention": "reference"}),
    "reference, sequence 2, tensor 2": (MIXED, {"attention": "reference"}),
    "cpu, sequence 2, tensor 2": (MIXED, {"attention": "cpu", "kernels": "cpu"}),
    "blocked, sequence 4": (SEQUENCE, {"attention": "blocked", "window": 9}),
    # A tensor axis of 4 cuts the query heads; the two key heads are repeated.
    "blocked, sequence 2, tensor 4": (MIXED | {"tensor": 4}, {"attention": "blocked"}),
    # A sequence that its axis does not divide stays whole.
    "blocked, sequence 3": ({"sequence": 3}, {"attention": "blocked", "attention_soft_cap": 2.0}),
    "splash, sequence 4": (SEQUENCE, {"attention": "splash", "remat": "full"}),
    "splash, fsdp 2, sequence 2, tensor 2": (
        MIXED | {"fsdp": 2},
        {"attention": "splash", "window": 9},
    ),
    # Rows that are padded before they are cut.
    "splash, sequence 2, odd": ({"sequence": 2}, {"attention": "splash", "length": 129}),
    "cudnn, sequence 2, odd": ({"sequence": 2}, {"attention": "cudnn", "length": 63}),
    "cudnn, sequence 2, tensor 2": (MIXED, {"attention": "cudnn", "window": 9}),
}


@pytest.fixture(scope="module")
def report():
    child = REPO / "tests/fixtures/attention_sequence.py"
    out = run_python(child, json.dumps(CASES), JAXREASON_CPU_FLAGS="0", timeout=900)
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_a_cut_sequence_equals_one_device(name, report):
    got = report[name]
    assert got["loss"] < 1e-6
    assert got["gradient"] < 1e-5, got["worst"]
    parts = CASES[name][0]["sequence"]
    assert got["cut"] == (1 if parts == 3 or "odd" in name else parts)
