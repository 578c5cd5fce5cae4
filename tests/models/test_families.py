"""Every family's settings of the decoder, through every path: the same numbers each way.

What the numbers are is held against Hugging Face's models elsewhere (golden arrays).
"""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import run_python

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.presets import PRESETS
from jaxreason.nn.moe import Moe
from jaxreason.nn.rope import LinearScaling, Llama3Scaling

TINY = ModelConfig(
    vocab_size=37, d_model=24, num_layers=2, num_heads=6, num_kv_heads=2, d_ff=20, init_std=0.3
)
LAYER_NORM = dataclasses.replace(
    TINY, num_kv_heads=0, norm="layer", mlp="gelu", mlp_bias=True, qkv_bias=True, out_bias=True
)
OPT = dataclasses.replace(
    LAYER_NORM, mlp="relu", positions="learned", max_positions=13, tie_embeddings=True
)
OLMOE = dataclasses.replace(
    TINY, qk_norm=True, qk_norm_scope="all", moe=Moe(num_experts=5, top_k=2)
)
FAMILIES = {
    "llama2": dataclasses.replace(TINY, num_kv_heads=0),
    "llama3": dataclasses.replace(
        TINY, head_dim=6, rope_base=500.0, rope_scaling=Llama3Scaling(original_context=6)
    ),
    "smollm2": dataclasses.replace(
        TINY, tie_embeddings=True, rope_scaling=LinearScaling(factor=2.0)
    ),
    "qwen2": dataclasses.replace(TINY, qkv_bias=True, window=3, window_from=1),
    "qwen3": dataclasses.replace(TINY, head_dim=10, qk_norm=True, tie_embeddings=True),
    "pythia": dataclasses.replace(
        LAYER_NORM, num_heads=3, parallel_residual=True, rotary_fraction=0.25
    ),
    "opt": OPT,
    "opt_350m": dataclasses.replace(OPT, embed_width=14, norm_place="post", final_norm=False),
    "olmoe": dataclasses.replace(OLMOE, clip_qkv=1.0),
    "olmoe_grouped": dataclasses.replace(
        OLMOE, moe=Moe(num_experts=5, top_k=2, normalise_top_k=True, form="grouped")
    ),
}  # fmt: skip
FIRST, SECOND, WIDTH = 7, 5, 12


def make_params(cfg):
    """Random values; scales are around 1."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        names = P.path_name(path).split("/")
        scale = names[-1].endswith("norm") or names[-1] == "scale"
        x = rng.normal(size=leaf.shape)
        return jnp.asarray(1 + 0.2 * x if scale else cfg.init_std * x, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, P.abstract(decoder.specs(cfg)))


def make_batch():
    """Rows: two documents packed; the first alone; the second alone; the first, padded in front."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 37, FIRST), rng.integers(0, 37, SECOND)
    tokens, positions, segments = np.zeros((3, 4, WIDTH), np.int32)
    for row, start, document, number in (
        (0, 0, first, 1), (0, FIRST, second, 2), (1, 0, first, 1), (2, 0, second, 1),
        (3, WIDTH - FIRST, first, 1),
    ):  # fmt: skip
        where = slice(start, start + len(document))
        tokens[row, where], segments[row, where] = document, number
        positions[row, where] = np.arange(len(document))
    batch = {"tokens": tokens, "positions": positions, "segment_ids": segments}
    return {name: jnp.asarray(x) for name, x in batch.items()}


def run(cfg, params, batch, remat="none"):
    """Logits, captured states and gradients of a loss that reads all of them."""
    cfg = dataclasses.replace(cfg, remat=remat)
    seen = (batch["segment_ids"] > 0)[..., None]

    @jax.jit
    def value_and_grad(params):
        def loss(p):
            out = decoder.forward(p, cfg, batch, capture=(0, 1))
            scores = decoder.logits(out)
            total = jnp.sum(seen * jax.nn.log_softmax(scores)[..., ::3] ** 2)
            total += jnp.sum(seen * out.captured[1] ** 2)
            if out.aux is not None:
                total += jnp.sum(seen[None] * out.aux["router_logits"] ** 2)
            return total / seen.sum(), (scores, out.captured)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (scores, captured)), grads = value_and_grad(params)
    return scores, captured, grads


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    """Packed = separate = left-padded; scanned = unrolled, in both kernels; all leaves learn."""
    cfg = FAMILIES[name]
    cfg.validate()
    params, batch = make_params(cfg), make_batch()
    scanned = dataclasses.replace(cfg, kernels="xla", layers="scan")
    scores, captured, grads = run(scanned, params, batch, remat="full")
    np.testing.assert_allclose(scores[0, :FIRST], scores[1, :FIRST], atol=5e-5)
    np.testing.assert_allclose(scores[0, FIRST:], scores[2, :SECOND], atol=5e-5)
    np.testing.assert_allclose(scores[3, WIDTH - FIRST :], scores[1, :FIRST], atol=5e-5)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        leaf = P.path_name(path)
        if leaf == "blocks/attn/k_bias" and cfg.positions == "learned":
            continue  # The softmax does not see what all keys share.
        each = np.asarray(g).reshape(cfg.num_layers if "blocks" in leaf else 1, -1)
        assert np.isfinite(each).all(), leaf
        assert (np.abs(each).max(axis=-1) > 1e-5).all(), leaf

    unrolled = dataclasses.replace(cfg, kernels="cpu", layers="unroll")
    b_scores, b_captured, b_grads = run(unrolled, decoder.unstack(params), batch)
    seen = np.asarray(batch["segment_ids"] > 0)
    np.testing.assert_allclose(scores[seen], b_scores[seen], atol=5e-5)
    for layer in captured:
        np.testing.assert_allclose(captured[layer][seen], b_captured[layer][seen], atol=5e-5)
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *b_grads["blocks"])
    for a, b in zip(
        jax.tree.leaves(grads), jax.tree.leaves({**b_grads, "blocks": stacked}), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(a).max()))

    decode(unrolled, params, batch, scores)


def decode(cfg, params, batch, scores):
    """Feeds rows 1 and 2 to a cache, three tokens a step, ragged at the end."""
    layers = decoder.unstack(params)
    cache = decoder.init_cache(cfg, 2, WIDTH, jnp.float32)
    step = jax.jit(lambda b, c: decoder.forward(layers, cfg, b, cache=c, capture=(2,)))
    lengths = np.array([FIRST, SECOND])
    for start in range(0, FIRST, 3):
        at = np.tile(np.arange(start, start + 3, dtype=np.int32), (2, 1))
        piece = {
            "tokens": jnp.take_along_axis(batch["tokens"][1:3], jnp.asarray(at), axis=1),
            "positions": jnp.asarray(at),
            "segment_ids": jnp.asarray((at < lengths[:, None]).astype(np.int32)),
        }
        out = step(piece, cache)
        cache, got = out.cache, decoder.logits(out)
        for row, n in enumerate(lengths):
            stop = min(start + 3, n)
            if stop > start:
                expected = scores[row + 1, start:stop]
                np.testing.assert_allclose(got[row, : stop - start], expected, atol=5e-5)
    np.testing.assert_array_equal(cache.lengths, lengths)
    assert 2 in out.captured and (out.aux is None) == (cfg.moe is None)


def test_family_parameters_have_their_names():
    def names(cfg):
        leaves = jax.tree_util.tree_leaves_with_path(P.abstract(decoder.specs(cfg)))
        return {P.path_name(path): leaf.shape for path, leaf in leaves}

    pythia, opt, olmoe = (names(FAMILIES[n]) for n in ("pythia", "opt_350m", "olmoe"))
    assert pythia["blocks/attn_norm/bias"] == (2, 24) and "blocks/mlp/gate" not in pythia
    assert pythia["blocks/attn/o_bias"] == (2, 24) and pythia["blocks/mlp/up_bias"] == (2, 20)
    assert opt["embed"] == (37, 14) and opt["positions"] == (13, 24)
    assert opt["embed_in"] == (14, 24) and opt["embed_out"] == (24, 14)
    assert not any(name.startswith("final_norm") or name == "unembed" for name in opt)
    assert olmoe["blocks/mlp/router"] == (2, 24, 5) and olmoe["blocks/mlp/down"] == (2, 5, 20, 24)
    assert olmoe["blocks/attn/q_norm"] == (2, 6, 4) and olmoe["blocks/attn/k_norm"] == (2, 2, 4)


def test_a_window_of_some_layers_alone():
    # With windows of one token everywhere, a token's logits depend on nothing but itself.
    cfg = dataclasses.replace(TINY, window=1, window_from=0, positions="rope")
    params, batch = make_params(cfg), make_batch()
    batch = {name: x[1:2, :FIRST] for name, x in batch.items()}
    changed = {**batch, "tokens": batch["tokens"].at[0, 0].add(1)}
    last = lambda cfg, b: decoder.logits(decoder.forward(params, cfg, b))[0, -1]  # noqa: E731
    np.testing.assert_array_equal(last(cfg, batch), last(cfg, changed))
    some = dataclasses.replace(cfg, window_from=1)
    assert np.abs(last(some, batch) - last(some, changed)).max() > 1e-3
    assert some.spans == ((None, 1), (1, 1)) and cfg.spans == ((1, 2),)


def test_a_token_beyond_the_learned_positions_is_not_a_number():
    cfg = FAMILIES["opt"]
    batch = {
        "tokens": jnp.zeros((1, 15), jnp.int32),
        "positions": jnp.arange(15)[None],
        "segment_ids": jnp.asarray([[1] * 14 + [0]]),
    }
    x = decoder.forward(make_params(cfg), cfg, batch, capture=(0,)).captured[0]
    assert np.isfinite(x[0, :13]).all() and np.isnan(x[0, 13]).all() and np.isfinite(x[0, 14]).all()


def is_matrix(name):
    """Whether a parameter is multiplied with (a table is looked up, a bias or scale added)."""
    matrices = "q k v o gate up down router unembed embed_in embed_out"
    return name.split("/")[-1] in matrices.split()


def test_bfloat16_keeps_what_must_stay_in_float32():
    for name in ("pythia", "opt_350m", "olmoe"):
        cast = decoder.cast(make_params(FAMILIES[name]), jnp.bfloat16)
        for path, leaf in jax.tree_util.tree_leaves_with_path(cast):
            name = P.path_name(path)
            assert leaf.dtype == (
                jnp.bfloat16 if is_matrix(name) and "router" not in name else jnp.float32
            ), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_place": "post", "parallel_residual": True}, "norm_place"),
        ({"moe": Moe(), "mlp": "relu"}, "SwiGLU"),
        ({"moe": Moe(), "mlp_bias": True}, "mlp_bias"),
        ({"moe": Moe(num_experts=4, top_k=5)}, "top_k is 5"),
        ({"moe": Moe(num_experts=0)}, "num_experts is 0"),
        ({"moe": Moe(balance=-1.0)}, "balance"),
        ({"positions": "learned"}, "max_positions"),
        ({"positions": "learned", "max_positions": 8, "rotary_fraction": 0.5}, "rotary_fraction"),
        ({"positions": "learned", "max_positions": 8, "rope_scaling": LinearScaling()}, "rope"),
        ({"max_positions": 8}, "max_positions is 8"),
        ({"max_positions": -8}, "max_positions is -8"),
        ({"rotary_fraction": 0.0}, "rotary_fraction"),
        ({"rotary_fraction": 0.3}, "even"),
        ({"rotary_fraction": 1.5}, "rotary_fraction"),
        ({"rope_scaling": LinearScaling(factor=0.0)}, "factor"),
        ({"rope_scaling": Llama3Scaling(high_freq_factor=1.0)}, "high_freq_factor"),
        ({"rope_base": 0.0}, "rope_base"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"embed_width": -1}, "embed_width"),
        ({"window": 0}, "window"),
        ({"window_from": 1}, "window_from"),
        ({"window": 4, "window_from": 9}, "window_from"),
        ({"clip_qkv": 0.0}, "clip_qkv"),
        ({"qk_norm_scope": "all"}, "qk_norm"),
        ({"attention": "cpu", "attention_soft_cap": 3.0}, "soft_cap"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, words):
    with pytest.raises(UserError, match=words) as error:
        dataclasses.replace(TINY, **change).validate()
    assert "\n" not in str(error.value)


def test_released_sizes():
    # Published parameter counts. OPT's are less the two rows of positions that nothing reads.
    counts = {
        "smollm2_360m": 361_821_120, "smollm2_1p7b": 1_711_376_384,
        "qwen2p5_1p5b": 1_543_714_304, "qwen2p5_3b": 3_085_938_688, "qwen2p5_7b": 7_615_616_512,
        "qwen3_1p7b": 1_720_574_976, "qwen3_4b": 4_022_468_096,
        "pythia_14m": 14_067_712, "pythia_70m": 70_426_624, "pythia_160m": 162_322_944,
        "pythia_410m": 405_334_016, "pythia_1b": 1_011_781_632, "pythia_1p4b": 1_414_647_808,
        "opt_125m": 125_239_296 - 2 * 768, "opt_350m": 331_196_416 - 2 * 1024,
        "opt_1p3b": 1_315_758_080 - 2 * 2048, "olmoe_1b_7b": 6_919_161_856,
        "llama3p2_3b": 3_212_749_824, "llama3_8b": 8_030_261_248, "llama3p1_8b": 8_030_261_248,
    }  # fmt: skip
    assert counts == {name: P.count(decoder.specs(PRESETS[name])) for name in counts}


def test_forward_flops_count_what_a_token_runs():
    """2 a weight that a token meets, as parameters are counted, plus attention's products."""
    for name, cfg in FAMILIES.items():
        specs = decoder.specs(cfg)
        leaves = jax.tree_util.tree_leaves_with_path(specs)
        matrices = [leaf for path, leaf in leaves if is_matrix(P.path_name(path))]
        weights = P.count(matrices) + (P.count(specs["embed"]) if cfg.tie_embeddings else 0)
        if cfg.moe is not None:
            experts = P.count([specs["blocks"]["mlp"][n] for n in ("gate", "up", "down")])
            weights -= experts * (cfg.moe.num_experts - cfg.moe.top_k) // cfg.moe.num_experts
        windows = [w or 8 for w, n in cfg.spans for _ in range(n)]
        keys = sum(w - w**2 / 16 for w in windows)
        expected = 2 * weights + 4 * cfg.num_heads * cfg.head_width * keys
        assert decoder.forward_flops(cfg, 8) == int(expected), name
        assert decoder.forward_flops(cfg, 8, depth=0) == 2 * 24 * (cfg.embed_width or 0), name


MESH = """
import json, sys
import jax, numpy as np
import jax.numpy as jnp
from models import test_families as F
from jaxreason.core.mesh import MeshConfig, check_divides, make_mesh, param_shardings, use_mesh
from jaxreason.models import decoder

def gradient(cfg, axes):
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: int(np.prod(list(axes.values())))])
    with use_mesh(mesh):
        specs = decoder.specs(cfg)
        check_divides(specs, mesh)
        params = jax.device_put(F.make_params(cfg), param_shardings(specs, mesh))
        scores, _, grads = F.run(cfg, params, F.make_batch())
        cut = {str(s.index) for s in params["blocks"]["mlp"]["up"].addressable_shards}
        return [np.asarray(x) for x in jax.tree.leaves((scores, grads))], len(cut)

report, alone = {}, {}
for name, cfg in F.mesh_cases().items():
    key = str(cfg).replace("grouped", "auto")  # One reference for both forms of the experts.
    if key not in alone:
        alone[key] = gradient(cfg, {"fsdp": 1})[0]
    one = alone[key]
    eight, pieces = gradient(cfg, json.loads(sys.argv[1])[name])
    apart = max(np.abs(a - b).max() / max(1.0, np.abs(a).max()) for a, b in zip(one, eight))
    report[name] = [float(apart), pieces]
print(json.dumps(report))
"""


def mesh_cases():
    """Settings whose sizes a mesh divides."""
    changes = {
        "d_model": 32, "num_heads": 4, "num_kv_heads": 0, "vocab_size": 40,
        "layers": "scan", "kernels": "xla",
    }  # fmt: skip
    even = {n: dataclasses.replace(FAMILIES[n], **changes) for n in ("opt_350m", "olmoe")}
    moe = Moe(num_experts=4, top_k=2)
    return {
        "opt_350m": even["opt_350m"],
        "experts": dataclasses.replace(even["olmoe"], moe=moe),
        "grouped": dataclasses.replace(even["olmoe"], moe=dataclasses.replace(moe, form="grouped")),
    }


def test_eight_devices_equal_one():
    axes = {
        "opt_350m": {"data": 2, "fsdp": 2, "tensor": 2},
        "experts": {"fsdp": 2, "tensor": 2, "expert": 2},
        "grouped": {"data": 2, "fsdp": 1, "tensor": 1, "expert": 4},
    }
    out = run_python(MESH, json.dumps(axes), devices=8)
    report = json.loads(out.strip().splitlines()[-1])
    assert {name: pieces for name, (_, pieces) in report.items()} == {
        "opt_350m": 4, "experts": 8, "grouped": 4
    }  # fmt: skip
    assert all(apart < 1e-4 for apart, _ in report.values()), report


def test_unstacked_parameters_are_the_same_leaves():
    params = make_params(FAMILIES["olmoe"])
    layers = decoder.unstack(params)
    assert isinstance(layers["blocks"], tuple) and len(layers["blocks"]) == 2
    assert decoder.unstack(layers) is layers
    again = {**layers, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers["blocks"])}
    chex.assert_trees_all_equal(again, params)
