"""The real compilers of TPU and GPU take the attention kernels, from a machine that has neither.

Skipped where jax[tpu] (libtpu) or jax[cuda13] is not installed. In an environment with one of them:

    TPU_SKIP_MDS_QUERY=1 python -m pytest tests/aot
"""

import importlib.util
import json

import pytest
from support import REPO, run_python

PACKAGE = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}
# Four chips, and eight; heads of 64 features, keys for every second of them.
SMALL = {"d_model": 512, "num_heads": 8, "num_kv_heads": 4, "d_ff": 512}
LENGTH, ROWS = 2048, 8


def compiled(platform: str, axes: dict, *backends: str, length: int = LENGTH, **settings):
    """What tests/fixtures/attention_compile.py says."""
    if importlib.util.find_spec(PACKAGE[platform]) is None:
        pytest.skip(f"{PACKAGE[platform]} is not installed")
    child = REPO / "tests/fixtures/attention_compile.py"
    shape = (json.dumps(axes), str(length), str(ROWS), json.dumps(SMALL | settings))
    out = run_python(
        child, platform, *shape, *backends, timeout=900, XLA_FLAGS="", TPU_SKIP_MDS_QUERY="1"
    )
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize(
    ("platform", "axes", "kernel"),
    [("tpu", {"fsdp": 4}, "splash"), ("gpu", {"fsdp": 8}, "cudnn")],
)
def test_the_kernel_holds_no_scores(platform, axes, kernel):
    got = compiled(platform, axes, "auto", "reference")
    assert got["auto"]["attention"] == kernel
    # Forward, computed again, and backward.
    assert got["auto"]["kernels"] >= 3 and got["reference"]["kernels"] == 0
    rows = ROWS // axes["fsdp"]
    scores = 4 * rows * SMALL["num_heads"] * LENGTH**2
    assert got["reference"]["temporaries"] > scores
    assert got["auto"]["temporaries"] < got["reference"]["temporaries"] - 0.75 * scores


@pytest.mark.parametrize(
    ("platform", "axes", "kernel"),
    [
        ("tpu", {"sequence": 2, "tensor": 2}, "splash"),
        ("gpu", {"fsdp": 2, "sequence": 2, "tensor": 2}, "cudnn"),
    ],
)
def test_a_cut_sequence_compiles(platform, axes, kernel):
    # An odd length, a window, and heads narrower than a TPU's lanes.
    got = compiled(platform, axes, kernel, length=1000, window=300)[kernel]
    assert got["kernels"] >= 3
    assert got["collectives"]["all-gather"] >= 2  # Keys and values, at least.
