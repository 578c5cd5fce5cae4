"""Eight simulated devices give what one gives: loss, gradients, updated parameters.

Next-token prediction, LET and experts on every axis alone and mixed; distillation on one mixed
mesh.

All in float32 and with SGD: Adam divides by the root of a gradient's square and so turns rounding
into steps.
"""

import json

import pytest
from support import REPO, run_python

SHAPES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 8": {"tensor": 8},
    "sequence 8": {"sequence": 8},
    "expert 8": {"expert": 8},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 2, sequence 2, tensor 2": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "expert 2, fsdp 2, tensor 2": {"expert": 2, "fsdp": 2, "tensor": 2},
    "data 2, expert 4": {"data": 2, "expert": 4},
}
ALONE, MIXED = [*SHAPES][:5], [*SHAPES][5:]
METHODS = {
    "next_token": [*ALONE, MIXED[0]],
    "let": [*ALONE, MIXED[1]],
    "experts": [*ALONE, *MIXED[2:]],
    "distill": MIXED[:1],
}
MICRO = "data 2, fsdp 2, tensor 2"
Case = tuple[str, dict[str, int], int, int, str]


def make_cases() -> dict[str, Case]:
    """Name -> method, axes, layers, micro-batches, kernels (cpu: this platform's, xla: others')."""
    cases: dict[str, Case] = {}
    for method, shapes in METHODS.items():
        for layers in (1, 2):
            chosen = [shape for shape in shapes if (shape in MIXED) == (layers == 2)]
            if chosen:
                cases[f"{method}, {layers} layers"] = (method, {}, layers, 1, "xla")
            for i, shape in enumerate(chosen):
                cases[f"{method}: {shape}"] = (
                    method,
                    SHAPES[shape],
                    layers,
                    1,
                    ("xla", "cpu")[i % 2],
                )
    cases["let, 2 micro-batches"] = ("let", {}, 2, 2, "xla")
    cases[f"let, 2 micro-batches: {MICRO}"] = ("let", SHAPES[MICRO], 2, 2, "xla")
    return cases


CASES = make_cases()


@pytest.fixture(scope="module")
def report():
    out = run_python(REPO / "tests/fixtures/mesh_steps.py", json.dumps(CASES), timeout=3000)
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1]])
def test_a_mesh_equals_one_device(name, report):
    many = report[name]
    for got, expected in zip(many["rows"], report[many["against"]]["rows"], strict=True):
        assert got == pytest.approx(expected, rel=2e-5, abs=1e-6)
    for what in ("grads", "params"):
        difference, where = many[what]
        assert difference < 1e-5, f"{what}: {where}"


def test_what_is_compared_is_not_trivial(report):
    for name in CASES:
        first, last = report[name]["rows"][0], report[name]["rows"][-1]
        assert first["grad_norm"] > 0.1 and abs(first["total"] - last["total"]) > 1e-3
    assert abs(report["let, 2 layers"]["rows"][0]["align_cosine"]) > 1e-3
    assert report["distill, 2 layers"]["rows"][0]["kl"] > 0.1
    assert report["experts, 1 layers"]["rows"][0]["busiest_expert"] > 1.05


@pytest.mark.parametrize(
    ("shape", "pieces"),
    [("data 8", 1), ("fsdp 8", 8), ("sequence 8", 8), ("expert 8", 8),
     ("fsdp 2, sequence 2, tensor 2", 8)],
)  # fmt: skip
def test_weights_moments_and_teacher_are_cut(shape, pieces, report):
    assert report[f"let: {shape}"]["pieces"] == [pieces] * 3


def test_tokens_go_to_the_devices_of_their_experts(report):
    for shape in METHODS["experts"]:
        assert report[f"experts: {shape}"]["all_to_all"] == ("expert" in shape), shape
