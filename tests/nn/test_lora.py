"""Adapters: peft's numbers, the identity, the merge, what is trained, and dropout by row."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import golden, llama_params

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.nn import lora
from jaxreason.nn.linear import linear, resolve_kernels
from jaxreason.nn.lora import LoraConfig, LoraWeight
from jaxreason.nn.moe import Moe
from jaxreason.objectives.lm import next_token
from jaxreason.train.phase import FrozenModel, Phase
from jaxreason.train.state import create
from jaxreason.train.step import make_train_step

GOLDEN = ModelConfig(vocab_size=37, d_model=16, num_layers=5, num_heads=4, num_kv_heads=2, d_ff=24)
# A window in some layers cuts the stack in two; biases, tied embeddings.
MODEL = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, qkv_bias=True,
    tie_embeddings=True, init_std=0.3,
)  # fmt: skip
EVERY = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
ALL = LoraConfig(rank=3, alpha=5.0, dropout=0.25, targets=EVERY)
FORMS = [("scan", "xla"), ("unroll", "cpu")]


def batch_of(rows: int = 4, length: int = 6, vocab: int = 32) -> dict[str, jax.Array]:
    tokens = jax.random.randint(jax.random.key(7), (rows, length), 0, vocab)
    return {
        "tokens": tokens,
        "positions": jnp.tile(jnp.arange(length), (rows, 1)),
        "segment_ids": jnp.ones((rows, length), jnp.int32),
        "example_id": jnp.tile(jnp.arange(rows)[:, None] + 11, (1, length)),
    }


def drawn(specs, seed: int = 0):
    """Values for every leaf, none of them zero."""
    key, specs = jax.random.key(seed), dict(specs)
    return P.initialise(
        jax.tree.map(lambda s: dataclasses.replace(s, init=P.normal(0.3)), specs), key
    )


@functools.cache
def model(cfg: ModelConfig = MODEL, lora_cfg: LoraConfig = ALL):
    """Random parameters and random adapters."""
    return drawn(decoder.specs(cfg)), drawn(lora.specs(decoder.specs(cfg), lora_cfg), 1)


@functools.partial(jax.jit, static_argnames=("cfg", "lora_cfg", "dtype"))
def logits(params, adapters, batch, key=None, cfg=MODEL, lora_cfg=ALL, dtype=jnp.float32):
    if adapters is not None:
        params = lora.attach(params, adapters, lora_cfg, key, batch)
    return decoder.logits(decoder.forward(params, cfg, batch, dtype=dtype))


def form(cfg: ModelConfig, mode: str, kernels: str) -> ModelConfig:
    return dataclasses.replace(cfg, layers=mode, kernels=kernels, attention="reference")


@pytest.mark.parametrize(("mode", "kernels"), FORMS)
def test_peft_gives_the_same_logits(mode, kernels):
    z = golden("llama_tiny_skip_lora")
    cfg = LoraConfig(rank=3, alpha=6.0, targets=("attn/q", "attn/v"))
    assert cfg.scale == z["lora_scale"]
    attn = {}
    for ours, heads in (("q", 4), ("v", 2)):
        name = f"lora/model.layers.{{}}.self_attn.{ours}_proj.lora_{{}}.default.weight"
        a = np.stack([z[name.format(i, "A")].T for i in range(5)])
        b = np.stack([z[name.format(i, "B")].T.reshape(3, heads, -1) for i in range(5)])
        attn[ours] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    batch = batch_of(*z["ids"].shape) | {"tokens": jnp.asarray(z["ids"], jnp.int32)}
    args = llama_params(z, 5), {"blocks": {"attn": attn}}, batch
    out = logits(*args, cfg=form(GOLDEN, mode, kernels), lora_cfg=cfg)
    np.testing.assert_allclose(out, z["logits_lora"], atol=1e-4)
    assert np.abs(z["logits_lora"] - z["logits_full"]).max() > 0.01


@pytest.mark.parametrize(("mode", "kernels"), FORMS)
def test_fresh_adapters_change_no_bit(mode, kernels):
    cfg, (params, _) = form(MODEL, mode, kernels), model()
    fresh = P.initialise(lora.specs(decoder.specs(MODEL), ALL), jax.random.key(0))
    for path, pair in lora.adapted(fresh):
        assert not pair["b"].any(), path
        bound = 1 / np.sqrt(np.prod(pair["a"].shape[1:-1]))
        assert 0.8 * bound < np.abs(pair["a"]).max() <= bound, path
    plain = logits(params, None, batch_of(), cfg=cfg)
    np.testing.assert_array_equal(logits(params, fresh, batch_of(), cfg=cfg), plain)


@pytest.mark.parametrize(("mode", "kernels"), FORMS)
def test_merged_is_attached(mode, kernels):
    """In every linear layer at once, where the stack is cut by a window too."""
    cfg = dataclasses.replace(form(MODEL, mode, kernels), window=3, window_from=1)
    (params, adapters), batch = model(), batch_of()
    merged = lora.merge(params, adapters, ALL)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    attached = logits(params, adapters, batch, cfg=cfg)
    np.testing.assert_allclose(logits(merged, None, batch, cfg=cfg), attached, atol=2e-4)
    assert np.abs(attached - logits(params, None, batch, cfg=cfg)).max() > 0.1


@pytest.mark.parametrize(("x", "w", "inputs"), [((4,), (4, 5), 1), ((4, 3), (4, 3, 5), 2)])
def test_the_product_by_loops(x, w, inputs):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, *x)), rng.normal(size=w)
    a, b = rng.normal(size=(*w.shape[:inputs], 2)), rng.normal(size=(2, 5))
    full = w.reshape(-1, 5) + 0.7 * a.reshape(-1, 2) @ b
    want = x.reshape(2, 3, -1) @ full
    for kernels in ("xla", "cpu"):
        weight = LoraWeight(*map(jnp.float32, (w, a, b)), scale=0.7)
        out = linear(jnp.float32(x), weight, kernels, inputs)
        np.testing.assert_allclose(out, want, atol=1e-5)


def products(jaxpr: Any):
    """Every matrix product of a program, those of loops and calls too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_no_gradient_of_the_base_is_computed(mode):
    """A weight's gradient is a sum over all tokens: only those of the adapters are there."""
    cfg, (params, adapters), batch = form(MODEL, mode, "xla"), model(), batch_of(5, 7)

    def loss(trees):
        return jnp.sum(
            decoder.logits(decoder.forward(lora.attach(trees[0], trees[1], ALL), cfg, batch))
        )

    def over_tokens(program):
        for eqn in products(jax.make_jaxpr(program)().jaxpr):
            axes = eqn.params["dimension_numbers"][0][0]
            if np.prod([eqn.invars[0].aval.shape[axis] for axis in axes]) == 5 * 7:
                yield eqn.outvars[0].aval.shape

    own = list(over_tokens(lambda: jax.grad(lambda a: loss((params, a)))(adapters)))
    every = list(over_tokens(lambda: jax.grad(loss)((params, adapters))))
    layers = 1 if mode == "scan" else 2
    assert len(own) == 2 * 7 * layers and all(ALL.rank in shape for shape in own)
    assert len(every) == 3 * 7 * layers + 1  # The embedding, which is the unembedding too.


@pytest.mark.parametrize("rank", [1, 8])
def test_gradients_in_bfloat16_sum_all_tokens(rank):
    """Terms of one sign: a sum in bfloat16 would stall after 256 of the 4096."""
    kernels = resolve_kernels("auto")  # The form for this device; on a CPU `xla` does stall.
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(0.5, 1.5, (2, 2048, 16)), jnp.bfloat16)
    leaves = [jnp.asarray(rng.uniform(0.5, 1.5, s), jnp.bfloat16) for s in ((16, rank), (rank, 24))]
    base = jnp.zeros((16, 24), jnp.bfloat16)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(x, a, b):
        y = linear(x, LoraWeight(base, a, b, scale=0.3), kernels)
        return jnp.sum(y.astype(jnp.float32))

    x64, a, b = (np.asarray(v, np.float64) for v in (x, *leaves))
    g = np.ones((2, 2048, 24))
    want = (
        0.3 * g @ b.T @ a.T,
        0.3 * np.einsum("btd,btf,rf->dr", x64, g, b),
        0.3 * np.einsum("btd,dr,btf->rf", x64, a, g),
    )
    for got, exact in zip(gradient(x, *leaves), want, strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=0.02)


def test_the_forward_computes_adapters_in_bfloat16():
    (params, adapters), batch, key = model(), batch_of(), jax.random.key(5)
    wide = logits(params, adapters, batch, key)
    half = logits(params, adapters, batch, key, dtype=jnp.bfloat16)
    assert 0 < np.abs(half - wide).max() < 0.05 * np.abs(wide).max()


@pytest.mark.parametrize(("mode", "kernels"), FORMS)
def test_dropout_goes_by_row_and_key(mode, kernels):
    cfg, (params, adapters), batch = form(MODEL, mode, kernels), model(), batch_of()
    run = lambda batch, key, **kw: logits(params, adapters, batch, key, cfg=cfg, **kw)  # noqa: E731
    first, second = jax.random.split(jax.random.key(3))
    plain, dropped = run(batch, None), run(batch, first)
    np.testing.assert_array_equal(dropped, run(batch, first))
    moved = np.abs(dropped - plain).max((1, 2))
    assert np.all(moved > 0.05), moved
    assert np.abs(dropped - run(batch, second)).max() > 0.05
    none = dataclasses.replace(ALL, dropout=0.0)
    np.testing.assert_array_equal(run(batch, first, lora_cfg=none), plain)
    order = np.array([2, 0, 3, 1])
    shuffled = run(jax.tree.map(lambda x: x[order], batch), first)
    np.testing.assert_allclose(shuffled, dropped[order], atol=1e-5)


def test_what_is_dropped():
    """The asked part of every row, other places in each row, layer and target; the mean stays."""
    (params, adapters), batch = model(), batch_of(8, 200)
    attn = lora.attach(params, adapters, ALL, jax.random.key(0), batch)["blocks"]["attn"]
    x = jnp.ones((8, 200, 16))
    masks = []
    for weight in (attn["q"], attn["k"]):
        for layer in range(2):
            out = jax.tree.map(lambda leaf, i=layer: leaf[i], weight).drop(x)
            assert set(np.unique(out)) == {0, np.float32(1 / 0.75)}
            masks.extend(np.asarray(out == 0).reshape(8, -1))
    masks = np.stack(masks).astype(float)
    n = masks.shape[1]
    assert np.abs(masks.mean(1) - 0.25).max() < 4.5 * np.sqrt(0.25 * 0.75 / n)
    both = masks @ masks.T / n
    np.fill_diagonal(both, 0.25**2)
    assert np.abs(both - 0.25**2).max() < 0.02


def test_micro_batches_train_like_the_whole_batch():
    """Through the train step: adapters alone have moments, and the base stays what it was."""
    cfg, (params, adapters) = form(MODEL, "scan", "xla"), model()
    tokens = jax.random.randint(jax.random.key(1), (4, 7), 0, 32)
    weights = jnp.asarray(np.arange(4)[:, None] < np.arange(1, 7)[None], jnp.float32)
    batch = batch_of() | {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch["loss_weights"] = weights

    def forward(groups, batch, capture, key=None):
        full = lora.attach(groups["model"], groups["lora"], ALL, key, batch)
        return decoder.forward(full, cfg, batch, capture=capture)

    base = FrozenModel(lambda: params, None)
    optimiser = {"lora": optax.sgd(0.1, momentum=0.9)}
    phase = Phase("tune", 9, next_token(), optimiser, frozen={"model": base})
    states = []
    for accumulate in (1, 2):
        step = make_train_step(forward, phase, key=jax.random.key(2), accumulate=accumulate)
        state = create({"lora": adapters}, [phase])
        states.append(jax.jit(step)(state, {"model": base.load()}, batch)[0])
    whole, parts = states
    assert set(whole.params) == set(whole.opt_state) == {"lora"}
    for a, b, old in zip(*map(jax.tree.leaves, (whole.params, parts.params, {"lora": adapters}))):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert np.abs(a - old).max() > 1e-4


def test_adapters_are_cut_like_their_weights():
    """The rank is on no mesh axis; every other axis has the name that it has in the weight."""
    of_model, of_lora = decoder.specs(MODEL), lora.specs(decoder.specs(MODEL), ALL)
    found = {"/".join(path): pair for path, pair in lora.adapted(of_lora)}
    assert set(found) == {f"blocks/{target}" for target in EVERY}
    for name, pair in found.items():
        _, part, leaf = name.split("/")
        weight, a, b = of_model["blocks"][part][leaf], pair["a"], pair["b"]
        assert a.axes[-1] is None and b.axes[:2] == ("layers", None)
        assert a.axes[:-1] + b.axes[2:] == weight.axes
        assert a.shape[:-1] + b.shape[2:] == weight.shape
        assert a.shape[-1] == b.shape[1] == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"alpha": 0.0}, "lora.alpha is 0.0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
        ({"targets": ()}, "lora.targets is empty"),
        ({"targets": ("attn/q", "attn/q")}, "attn/q twice"),
        ({"targets": ("embed",)}, "embed, a table"),
        ({"targets": ("unembed",)}, "unembed, a table"),
        ({"targets": ("attn/w",)}, "did you mean"),
        ({"targets": ("q_proj",)}, "'q_proj', which is no linear layer"),
        ({"targets": ("embed_in",)}, "embed_in, which this model does not have"),
    ],
)
def test_what_is_refused(change, said):
    with pytest.raises(UserError) as error:
        lora.specs(decoder.specs(MODEL), dataclasses.replace(ALL, **change))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_experts_are_refused():
    experts = dataclasses.replace(MODEL, moe=Moe(num_experts=4, top_k=2))
    with pytest.raises(UserError, match="mlp/up, which is one of experts"):
        lora.specs(decoder.specs(experts), LoraConfig(targets=("attn/q", "mlp/up")))
