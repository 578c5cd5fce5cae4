"""The CPU compiler flags of `core.platform` must not change what is computed.

jaxlib 0.12's oneDNN rewriter folds a SiLU into the product that makes its input, also where that
input is read again: `jax.nn.silu(x @ w)` in float32, flat, then has a gradient for w that is 25 %
wrong. Our forms are written so that it does not apply; this holds them to it, gates far from zero.
"""

import json

import pytest
from support import run_python

from jaxreason.core.platform import CPU_FLAGS, known_jaxlib

CODE = """
import sys, json
import jax, jax.numpy as jnp, numpy as np
from jaxreason.core import params as P
from jaxreason.models import decoder
from jaxreason.objectives.lm import next_token

path, flags = sys.argv[1], sys.argv[2]
rng = np.random.default_rng(0)
B, T = 4, 256
batch = {
    "tokens": jnp.asarray(rng.integers(0, 256, (B, T)), jnp.int32),
    "targets": jnp.asarray(rng.integers(0, 256, (B, T)), jnp.int32),
    "positions": jnp.tile(jnp.arange(T)[None], (B, 1)),
    "segment_ids": jnp.ones((B, T), jnp.int32),
    "loss_weights": jnp.ones((B, T)),
}

def gradient(kernels, dtype):
    cfg = decoder.resolve(decoder.ModelConfig(
        vocab_size=256, d_model=512, num_layers=1, num_heads=4, d_ff=1408, init_std=0.06,
        kernels=kernels))
    params = P.initialise(decoder.specs(cfg), jax.random.key(0))

    def loss(p):
        out = decoder.forward(p, cfg, batch, dtype=dtype)
        return next_token().terms(out, {}, batch, None, None, 0)[0]["nll"] / (B * T)

    tree = jax.jit(jax.grad(loss))(params)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {P.path_name(p): np.asarray(x, np.float32) for p, x in leaves}

if flags == "off":
    np.savez(path, **gradient("xla", jnp.float32))
else:
    reference, worst = np.load(path), {}
    for kernels, dtype in (("xla", "float32"), ("cpu", "float32"), ("cpu", "bfloat16")):
        g = gradient(kernels, jnp.dtype(dtype))
        worst[f"{kernels} {dtype}"] = max(
            float(np.linalg.norm(g[n] - reference[n]) / np.linalg.norm(reference[n])) for n in g)
    print(json.dumps(worst))
"""


@pytest.mark.skipif(not known_jaxlib(), reason="the flags are given to known jaxlib versions only")
def test_gradients_with_the_flags_equal_those_without(tmp_path):
    path = str(tmp_path / "reference.npz")
    run_python(CODE, path, "off", devices=1)
    out = run_python(CODE, path, "on", devices=1, XLA_FLAGS=" ".join(CPU_FLAGS))
    worst = json.loads(out.strip().splitlines()[-1])
    assert worst["xla float32"] < 1e-4 and worst["cpu float32"] < 1e-4, worst
    assert worst["cpu bfloat16"] < 0.05, worst
