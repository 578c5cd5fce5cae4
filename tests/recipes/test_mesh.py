"""Eight simulated devices give what one gives: loss, gradients, updated parameters.

LET and, as its last step, next-token prediction on every axis alone and mixed, and so experts;
distillation on one mixed mesh. FiRST's two phases cover the axes between them: routers with drawn
gates on a base of experts, and adapters, whose inputs are dropped, under each prompt's best layer.

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
# Method -> layers -> meshes; two layers are scanned.
METHODS = {
    "let": {1: ALONE, 2: MIXED[1:2]},
    "experts": {1: ALONE, 2: MIXED[2:]},
    "distill": {2: MIXED[:1]},
    "routers": {1: ["sequence 8", "expert 8"]},
    "adapters": {2: [MIXED[0], "tensor 8"]},
}
MICRO = MIXED[0]
Case = tuple[str, dict[str, int], int, int, str]


def make_cases() -> dict[str, Case]:
    """Name -> method, axes, layers, micro-batches, kernels (cpu: this platform's, xla: others')."""
    cases: dict[str, Case] = {}
    for method, by_layers in METHODS.items():
        for layers, shapes in by_layers.items():
            cases[f"{method}, {layers} layers"] = (method, {}, layers, 1, "xla")
            for i, shape in enumerate(shapes):
                kernels = ("xla", "cpu")[i % 2]
                cases[f"{method}: {shape}"] = (method, SHAPES[shape], layers, 1, kernels)
    # Against the whole batch, whose numbers micro-batches give too.
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
    for layers in (1, 2):
        rows = report[f"let, {layers} layers"]["rows"]
        assert abs(rows[0]["align_cosine"]) > 1e-3
        assert abs(rows[1]["total"] - rows[1]["nll"]) > 1e-4
        assert rows[2]["total"] == pytest.approx(rows[2]["nll"], rel=1e-6)
    assert report["distill, 2 layers"]["rows"][0]["kl"] > 0.1
    assert report["experts, 1 layers"]["rows"][0]["busiest_expert"] > 1.05
    for case in ("routers, 1 layers", "adapters, 2 layers"):  # Prompts disagree on the layers.
        assert all(0 < row["depth/keep_00"] < 1 for row in report[case]["rows"])
    assert report["adapters, 2 layers"]["rows"][0]["depth/kept_layers"] == 1


@pytest.mark.parametrize(
    ("case", "pieces"),
    [
        ("let: data 8", 1),
        ("let: fsdp 8", 8),
        ("let: sequence 8", 8),
        ("let: expert 8", 8),
        ("let: fsdp 2, sequence 2, tensor 2", 8),
        ("routers: sequence 8", 8),
        ("adapters: tensor 8", 8),
    ],
)
def test_weights_moments_and_frozen_models_are_cut(case, pieces, report):
    assert report[case]["pieces"] == [pieces] * 3


def test_tokens_go_to_the_devices_of_their_experts(report):
    for shape in [*ALONE, *MIXED[2:]]:
        assert report[f"experts: {shape}"]["all_to_all"] == ("expert" in shape), shape
