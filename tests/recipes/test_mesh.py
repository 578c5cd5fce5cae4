"""Eight simulated devices give what one gives: loss, gradients, weights, with the teacher sharded.

All in float32 and with SGD: Adam divides by the root of a gradient's square and so turns rounding
into steps.
"""

import json

import pytest
from support import REPO, run_python

STEPS = 3
# Mesh axes, micro-batches, kernels (cpu: those of this platform, xla: those of TPU and GPU).
CASES = {
    "one": ({}, 1, "cpu"),
    "fsdp 8": ({"fsdp": 8}, 1, "cpu"),
    "data 2, tensor 4": ({"data": 2, "tensor": 4}, 1, "cpu"),
    "data 2, fsdp 2, tensor 2": ({"data": 2, "fsdp": 2, "tensor": 2}, 1, "xla"),
    "fsdp 4, sequence 2": ({"fsdp": 4, "sequence": 2}, 1, "xla"),
    "the same, 4 micro-batches": ({"data": 2, "fsdp": 2, "tensor": 2}, 4, "cpu"),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    room = tmp_path_factory.mktemp("mesh")
    child = REPO / "tests/fixtures/mesh_steps.py"
    out = run_python(child, str(room), json.dumps(CASES), str(STEPS), JAXREASON_CPU_FLAGS="0")
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("name", [name for name in CASES if name != "one"])
def test_a_mesh_equals_one_device(name, report):
    one, many = report["one"], report[name]
    for step in range(STEPS):
        assert many["rows"][step] == pytest.approx(one["rows"][step], rel=2e-5, abs=1e-6), step
    assert many["apart"] < 1e-5, many["worst"]
    assert many["held_out"] == pytest.approx(one["held_out"], rel=1e-5)


def test_what_is_compared_is_not_trivial(report):
    one = report["one"]
    assert one["segments"] > 1, "no row holds two documents"
    losses = [row["nll"] for row in one["rows"]]
    assert losses[-1] < losses[0] - 0.05 and abs(one["rows"][0]["align_cosine"]) > 1e-4
    assert all(row["grad_norm"] > 0.1 for row in one["rows"])


@pytest.mark.parametrize(
    ("name", "pieces"), [("one", 1), ("fsdp 8", 8), ("data 2, fsdp 2, tensor 2", 4)]
)
def test_weights_moments_and_teacher_are_cut(name, pieces, report):
    assert report[name]["pieces"] == [pieces] * 3
