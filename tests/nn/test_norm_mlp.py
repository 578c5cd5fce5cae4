"""Norms, biases and feed-forward layers: against float64 NumPy, and the two platforms' forms."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.nn import rope
from jaxreason.nn.linear import add_bias
from jaxreason.nn.mlp import activate, mlp, mlp_specs
from jaxreason.nn.norm import layer_norm, norm, norm_specs

B, T, D, F = 2, 5, 12, 20
KERNELS = ("xla", "cpu")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def check(f, expected, *args):
    """Holds `f(kernels, *args)` and its gradients to a float64 function's differences."""
    weights = normal(99, *np.shape(expected(*args)))

    def difference(i, direction):
        moved = lambda s: [  # noqa: E731
            np.asarray(a, np.float64) + (s * direction if i == j else 0) for j, a in enumerate(args)
        ]
        step = 1e-5
        plus, minus = expected(*moved(step)), expected(*moved(-step))
        return float(np.sum(np.asarray(weights, np.float64) * (plus - minus)) / (2 * step))

    for kernels in KERNELS:
        loss = lambda *a, k=kernels: jnp.sum(f(k, *a) * weights)  # noqa: E731
        out, pull = (
            jax.jit(lambda *a, k=kernels: f(k, *a))(*args),
            jax.jit(jax.grad(loss, tuple(range(len(args))))),
        )
        np.testing.assert_allclose(out, expected(*args), rtol=2e-5, atol=2e-5)
        for i, g in enumerate(pull(*args)):
            direction = np.asarray(normal(100 + i, *g.shape), np.float64)
            got = float(np.sum(np.asarray(g, np.float64) * direction))
            assert got == pytest.approx(difference(i, direction), rel=1e-3, abs=1e-3), (kernels, i)


def np_layer_norm(x, scale, bias) -> np.ndarray:
    x, scale, bias = (np.asarray(a, np.float64) for a in (x, scale, bias))
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def test_layer_norm():
    x = normal(0, B, T, D) * 3 + 1
    ours = lambda k, x, scale, bias: layer_norm(x, scale, bias, 1e-5, k)  # noqa: E731
    check(ours, np_layer_norm, x, normal(1, D), normal(2, D))


def test_norm_by_kind():
    x, specs = normal(0, B, T, D), norm_specs("layer", D)
    p = P.initialise(specs, jax.random.key(0))
    assert set(p) == {"scale", "bias"} and norm_specs("rms", D).shape == (D,)
    np.testing.assert_allclose(
        norm("layer", x, p, 1e-5, "xla"), np_layer_norm(x, [1.0], [0.0]), atol=1e-5
    )
    scale = normal(1, D)
    rms = x * scale[None, None] / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm("rms", x, scale, 1e-5, "xla"), rms, atol=1e-5)


NP_ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "gelu", "gelu_tanh", "relu"])
def test_mlp(kind, bias):
    specs = mlp_specs(kind, D, F, bias, 0.5, 0.5)
    assert ("gate" in specs) == (kind == "swiglu") and ("down_bias" in specs) == bias
    names = sorted(specs)
    values = [normal(i, *specs[name].shape) for i, name in enumerate(names)]

    def expected(x, *values):
        p = {n: np.asarray(v, np.float64) for n, v in zip(names, values, strict=True)}
        x = np.asarray(x, np.float64)
        into = lambda n: x @ p[n] + p.get(f"{n}_bias", 0)  # noqa: E731
        if kind == "swiglu":
            hidden = NP_ACTIVATIONS["silu"](into("gate")) * into("up")
        else:
            hidden = NP_ACTIVATIONS[kind](into("up"))
        return hidden @ p["down"] + p.get("down_bias", 0)

    def ours(kernels, x, *values):
        return mlp(kind, dict(zip(names, values, strict=True)), x, kernels)

    check(ours, expected, normal(9, B, T, D), *values)


@pytest.mark.parametrize("kernels", KERNELS)
def test_activations_in_bfloat16_are_rounded_once(kernels):
    x = jnp.linspace(-6, 6, 999).astype(jnp.bfloat16)
    for kind in ("gelu", "gelu_tanh", "relu"):
        exact = NP_ACTIVATIONS[kind](np.asarray(x, np.float64))
        got = np.asarray(activate(kind, x, kernels), np.float64)
        np.testing.assert_allclose(got, exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_bias_gradient_sums_in_float32(kernels, shape):
    # 4,096 ones: in bfloat16 the sum would stop at 256.
    y = jnp.zeros((16, 256, *shape), jnp.bfloat16)

    def total(bias):
        return jnp.sum(add_bias(y, bias, kernels).astype(jnp.float32))

    out = add_bias(y, jnp.ones(shape), kernels)
    assert out.dtype == jnp.bfloat16 and float(out.min()) == 1.0
    np.testing.assert_array_equal(
        jax.jit(jax.grad(total))(jnp.zeros(shape)), np.full(shape, 4096.0)
    )


def test_a_fraction_of_a_head_rotates():
    x, positions = normal(0, 1, T, 2, 8), jnp.arange(T)[None]
    tables = rope.rope_tables(positions, rope.frequencies(4, 100.0))
    for kernels in KERNELS:
        y = rope.apply_rope(x, *tables, kernels)
        np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
        np.testing.assert_allclose(y[..., :4], rope.apply_rope(x[..., :4], *tables, kernels))
        assert np.abs(y[:, 1:, :, :4] - x[:, 1:, :, :4]).max() > 0.1


def test_rope_scaling_of_released_configs():
    entry = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert rope.scaling_from(entry) == rope.Llama3Scaling(factor=32.0)
    assert rope.scaling_from({"type": "linear", "factor": 2}) == rope.LinearScaling(factor=2.0)
    assert rope.scaling_from(None) is None and rope.scaling_from({"rope_type": "default"}) is None
    bad_entries: tuple[tuple[Any, str], ...] = (
        ({"rope_type": "yarn", "factor": 4.0}, "'yarn'"),
        ({"type": ["dynamic"]}, "dynamic"),
        ({"rope_type": "linear"}, "factor None"),
        ({**entry, "high_freq_factor": "4"}, "high_freq_factor '4'"),
        ({**entry, "factor": -1.0}, "factor is -1.0"),
        ({**entry, "high_freq_factor": 1.0}, "high_freq_factor"),
        ([1], "list"),
    )
    for bad, words in bad_entries:
        with pytest.raises(UserError, match=words.replace("(", r"\(")) as error:
            rope.scaling_from(bad)
        assert "\n" not in str(error.value)
