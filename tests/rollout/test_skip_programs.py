"""What skipping compiles to, and what it leaves in the cache."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_model import ragged_prompts
from skip_model import LAYERS, SCOPES, constant, random_routers, tiny

from jaxreason.core.errors import UserError
from jaxreason.models import decoder
from jaxreason.nn import kv_cache
from jaxreason.rollout import GREEDY, Stats, generate, prepare
from jaxreason.rollout import slots as device
from jaxreason.rollout.sampling import SamplingArrays

PROMPTS = ragged_prompts(3, seed=8, longest=16)
HOW = dict(max_new_tokens=6, slots=3)
SETS = [(True,) * 4, (True, False, False, True), (False, True, True, False), (False,) * 4]
CAPACITY = 48  # No other size of the programs.


def test_one_program_serves_all_sets_of_layers():
    names = ("extend", "admit", "decode")
    model = prepare(tiny(), 3)
    for scope in SCOPES:
        generate(model, PROMPTS, GREEDY, keep=SETS[0], skip_scope=scope, **HOW)
    before = {name: getattr(device, name)._cache_size() for name in names}
    layers = set()
    for keep in SETS:
        for scope in SCOPES:
            stats = Stats()
            generate(model, PROMPTS, GREEDY, keep=keep, skip_scope=scope, stats=stats, **HOW)
            layers.add(stats.layers.computed_per_step)
    assert layers == {4, 2, 0}
    assert {name: getattr(device, name)._cache_size() for name in names} == before
    # Routers decide over rows of the same token loop.
    generate(constant(SETS[1], "decode_only"), PROMPTS, GREEDY, **HOW)
    assert device.decode._cache_size() == before["decode"]


@functools.cache
def lowered(skips: bool):
    cfg = tiny().config
    params = device.prepare_params(tiny().params, cfg, jnp.float32, 3)
    state = device.empty_slots(cfg, 3, CAPACITY, "float32", skips)
    eos = jnp.zeros(1, jnp.int32)
    return device.decode.lower(
        params, state, eos, jnp.bool_(False), cfg=cfg, dtype="float32", chunk=4
    )


def test_layers_stand_in_conditionals_only_where_they_may_be_skipped():
    cases = [lowered(skips).as_text().count("stablehlo.case") for skips in (False, True)]
    assert cases[1] == cases[0] + LAYERS


def test_a_conditional_copies_no_cache():
    shape = re.compile(rf"= f32\[3,2,{CAPACITY},8\]\S* (copy|select)\(")
    text = [lowered(skips).compile().as_text() for skips in (False, True)]
    assert all(f"f32[3,2,{CAPACITY},8]" in t for t in text)
    found = [len(shape.findall(t)) for t in text]
    assert found == [0, 0]
    sizes = [lowered(skips).compile().memory_analysis().temp_size_in_bytes for skips in (0, 1)]
    assert sizes[1] < sizes[0] + 3 * 2 * CAPACITY * 8 * 4, "less than one more cache array"


def kernels(program: str) -> int:
    """Operations of a compiled program that run by themselves: none inside a fusion, no names."""
    free = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "conditional"}
    number, fused = 0, False
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            fused = re.search("fused_computation|wrapped_", line.split("(")[0]) is not None
        elif not fused and (found := re.match(r"\s+(ROOT )?%\S+ = .*? ([a-z-]+)\(", line)):
            number += found[2] not in free
    return number


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the CPU's compiler")
def test_a_conditional_costs_a_layer_four_small_kernels_at_most():
    # 14 for four layers: predicates, and each row's choice. It was 35 where the rotary tables, the
    # cache's places and the choice of rows were made in every layer.
    plain, skips = (kernels(lowered(skips).compile().as_text()) for skips in (False, True))
    assert plain > 20 * LAYERS
    assert plain < skips <= plain + 4 * LAYERS


def decoded(keep, scope, steps=5):
    """A cache of PROMPTS and the tokens that followed, after a token loop with `keep` [B,L]."""
    model = prepare(tiny(), 3)
    cfg, keep = model.config, np.asarray(keep)
    rows = np.stack([np.resize(p, 16) for p in PROMPTS]).astype(np.int32)
    counts = np.array([len(p) for p in PROMPTS], np.int32)
    cache, logits = device.empty_prompts(cfg, 3, 16, "float32")
    cache, logits, _ = device.extend(
        model.params, cache, logits, rows, counts, None,
        keep if scope == "everywhere" else None, cfg=cfg, dtype="float32", empty=True,
    )  # fmt: skip
    zeros = np.zeros(3, np.int32)
    entrants = device.Entrants(
        number=jnp.int32(3), source=np.arange(3), slot=np.arange(3), prompt_index=zeros,
        sample_index=zeros, limit=np.full(3, steps + 1), ignore_eos=np.ones(3, bool),
        sampling=SamplingArrays(np.zeros(3, np.float32), zeros, np.ones(3, np.float32), zeros),
        keep=keep,
    )  # fmt: skip
    state = device.empty_slots(cfg, 3, 32, "float32", True)
    eos = jnp.full(1, -1, jnp.int32)
    state, first = device.admit(state, cache, logits, entrants, jax.random.key(0), eos)
    first = np.asarray(first.tokens)
    state, out = device.decode(
        model.params, state, eos, jnp.bool_(False), cfg=cfg, dtype="float32", chunk=8
    )
    assert out.number.tolist() == [steps] * 3
    return state.cache, np.concatenate([first[:, None], out.tokens[:, :steps]], axis=1), counts


@pytest.mark.parametrize("scope", SCOPES)
def test_skipped_entries_are_not_counted_and_rows_resume_only_where_they_can(scope):
    keep = np.array([SETS[0], SETS[1], SETS[2]])  # A union: every layer is computed.
    cache, tokens, counts = decoded(keep, scope)
    np.testing.assert_array_equal(cache.lengths, counts + 5)
    prompt = np.zeros(3, int) if scope == "everywhere" else counts
    want = np.where(keep, (counts + 5)[:, None], prompt[:, None])
    np.testing.assert_array_equal(cache.valid, want.T)
    kv_cache.require_complete(cache, keep.T)  # With its own layers a row goes on as it is.
    with pytest.raises(UserError, match="^row 1 of the key-value cache"):
        kv_cache.require_complete(cache)
    with pytest.raises(UserError, match="^row 2 .* truncate"):
        kv_cache.require_complete(cache, np.array([SETS[0], SETS[1], SETS[1]]).T)
    # What is cut off is computed again, by all layers: the row is then the full model's.
    cut = cache.truncate(kv_cache.complete_lengths(cache))
    kv_cache.require_complete(cut)
    assert cut.lengths.tolist() == [counts[0] + 5, *prompt[1:]]
    width = 24
    rows = np.stack([np.resize([*p, *t], width) for p, t in zip(PROMPTS, tokens)]).astype(np.int32)
    left = counts + 5 - np.asarray(cut.lengths)
    new = np.stack([np.roll(row, -n) for row, n in zip(rows, np.asarray(cut.lengths))])
    at = np.arange(width, dtype=np.int32)[None]
    batch = {
        "tokens": new,
        "positions": at + np.asarray(cut.lengths)[:, None],
        "segment_ids": (at < left[:, None]).astype(np.int32),
    }
    forward = jax.jit(functools.partial(decoder.forward, cfg=tiny().config))
    again = forward(tiny().params, batch=batch, cache=cut)
    kv_cache.require_complete(again.cache)
    whole = {"tokens": rows, "positions": at + np.zeros((3, 1), np.int32)}
    whole["segment_ids"] = (at < (counts + 5)[:, None]).astype(np.int32)
    full = forward(tiny().params, batch=whole)
    for row in (1, 2):
        got = again.final[row, left[row] - 1]
        np.testing.assert_allclose(got, full.final[row, counts[row] + 4], atol=2e-5)


def test_a_table_shows_the_layers_of_each_completion():
    stats, model = Stats(), random_routers("decode_only")
    done = generate(model, PROMPTS, GREEDY, ignore_eos=True, stats=stats, **HOW)
    lines = stats.layers.table().splitlines()
    assert len(lines) == 5 and lines[0].split() == [
        "prompt",
        "sample",
        "kept",
        "tokens",
        "ms/token",
        "0",
    ]
    for c, line in zip(done, lines[1:]):
        prompt, sample, kept, tokens, ms, drawn = line.split()
        assert (int(prompt), int(sample), int(tokens)) == (c.prompt_index, 0, 5)
        assert [i for i, mark in enumerate(drawn) if mark == "#"] == c.layers
        assert int(kept) == len(c.layers) and drawn.count(".") == LAYERS - int(kept)
        assert float(ms) > 0
    assert "batching union" in lines[-1] and "in 3 completions" in lines[-1]
    layers = stats.layers
    assert layers.steps == 5 and layers.tokens == 15
    assert abs(layers.seconds - stats.decode_seconds) < 1e-9
    # The record adds up over calls, as the totals do.
    generate(model, PROMPTS[:1], GREEDY, ignore_eos=True, stats=stats, **HOW)
    assert stats.layers is layers and len(layers.completions) == 4


def test_without_routers_and_sets_nothing_is_noted():
    stats = Stats()
    (c, *_) = generate(tiny(), PROMPTS, GREEDY, stats=stats, **HOW)
    assert stats.layers is None and c.layers is None
    off = dataclasses.replace(random_routers("decode_only"), depth=None)
    assert generate(off, PROMPTS, GREEDY, **HOW)[0] == c
