"""Self-speculative decoding gives what the full model gives, whatever drafts."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_model import EOS_IDS, full_logprobs, ragged_prompts, tiny_model
from skip_model import SCOPES, plain, with_depth

from jaxreason import generate as cli
from jaxreason.core.errors import UserError
from jaxreason.depth.decision import Decision, Skipper, static_routers
from jaxreason.nn import kv_cache
from jaxreason.nn.moe import Moe
from jaxreason.rollout import (
    GREEDY,
    Request,
    Sampling,
    SelfSpeculation,
    Stats,
    draft_verify,
    generate,
    run,
)
from jaxreason.rollout import slots as device
from jaxreason.rollout.sampling import stack_settings
from jaxreason.rollout.self_speculation import DraftPlan, static_set

LAYERS, WIDTH = 3, 32
# Most of a test's time is compiling: few kinds of drafts, one or three slots, one capacity.
PROMPTS = ragged_prompts(6, seed=9, longest=16)
HOW = dict(max_new_tokens=17, slots=3, logprobs=True)
EXIT = SelfSpeculation(exit_layer=2, tokens=3)
SET = SelfSpeculation(layers=(True, False, True), tokens=3)
DRAFTS = {
    "exit": EXIT,
    "exit_at_the_top": SelfSpeculation(exit_layer=LAYERS, tokens=3),
    "no_layer": SelfSpeculation(layers=(False,) * LAYERS, tokens=3),
    "set": SET,
    "set_without_the_first": SelfSpeculation(layers=(False, True, False), tokens=3),
}
WARM = Sampling(temperature=0.8, top_p=0.95)


tiny = functools.partial(tiny_model, num_layers=LAYERS)


def routed(scope, keep=None):
    """`tiny` with routers that choose `keep`, or by what they read."""
    if keep is not None:
        return with_depth(
            tiny(), Skipper(static_routers(keep, WIDTH), scope, Decision(always_keep=()))
        )
    routers = {"w": jax.random.normal(jax.random.key(30), (LAYERS, WIDTH)), "b": jnp.zeros(LAYERS)}
    return with_depth(tiny(), Skipper(routers, scope, Decision(always_keep=(0,))))


def same(got, want):
    assert plain(got) == plain(want)
    for c, w in zip(got, want):
        np.testing.assert_allclose(c.logprobs, w.logprobs, atol=2e-5)
        assert c.sampling_logprobs == w.sampling_logprobs and c.layers is None


@functools.cache
def full():
    """What the full model says to PROMPTS."""
    done = generate(tiny(), PROMPTS, GREEDY, **HOW)
    assert {c.finish_reason for c in done} == {"eos", "length"}
    return done


@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_is_the_full_models_token_for_token(name):
    stats = Stats()
    same(generate(tiny(), PROMPTS, GREEDY, speculation=DRAFTS[name], stats=stats, **HOW), full())
    drafts = stats.drafts
    assert stats.layers is None and drafts.tokens == sum(len(c.tokens) - 1 for c in full())
    assert 1 <= drafts.tokens_per_verification <= DRAFTS[name].tokens + 1
    ended = [c.finish_reason == "eos" for c in full()]
    for entry, c, by_eos in zip(drafts.completions, full(), ended):
        assert entry.tokens == len(c.tokens) - 1
        # An end that was drafted takes the place of the full model's own token.
        extra = entry.accepted + entry.verifications - entry.tokens
        assert extra == 0 or (extra == 1 and by_eos)
    if name == "exit_at_the_top":
        middle = [e.tokens % 4 in (1, 2) for e in drafts.completions]
        assert any(a and b for a, b in zip(ended, middle)), "an end in the middle of a draft"
        assert drafts.acceptance == 1 and drafts.tokens_per_verification > 3


@pytest.mark.parametrize(
    "changes, draft",
    [
        (
            {"window": 5, "kernels": "xla", "tie_embeddings": True},
            SelfSpeculation(layers=(False, True), tokens=4),
        ),
        # A position beyond the table would be NaN: no draft goes there.
        (
            {
                "positions": "learned",
                "max_positions": 16 + 12,
                "attention_soft_cap": 3.0,
                "moe": Moe(num_experts=4, top_k=2),
            },
            SelfSpeculation(exit_layer=1, tokens=4),
        ),
    ],
    ids=["window", "experts"],
)
def test_greedy_of_other_shapes(changes, draft):
    model = tiny_model(**changes)
    how = dict(max_new_tokens=12, slots=2, ignore_eos=True, logprobs=True)
    prompts = [PROMPTS[0], [*PROMPTS[1], *PROMPTS[2], *PROMPTS[3]][:16]]
    want = generate(model, prompts, GREEDY, **how)
    same(generate(model, prompts, GREEDY, speculation=draft, **how), want)


def identity_above(exit_layer: int):
    """`tiny` with layers above the exit that add nothing."""
    model = tiny()
    blocks = model.params["blocks"]
    above = jnp.arange(LAYERS) >= exit_layer

    def cut(leaf):
        return jnp.where(above.reshape(-1, *[1] * (leaf.ndim - 1)), 0.0, leaf)

    attn = {**blocks["attn"], "o": cut(blocks["attn"]["o"])}
    mlp = {**blocks["mlp"], "down": cut(blocks["mlp"]["down"])}
    return dataclasses.replace(
        model, params={**model.params, "blocks": {**blocks, "attn": attn, "mlp": mlp}}
    )


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_draft_that_agrees_is_accepted_whole(sampling):
    model, stats = identity_above(2), Stats()
    how = dict(max_new_tokens=17, slots=3, ignore_eos=True, logprobs=True)
    done = generate(model, PROMPTS[:3], sampling, speculation=EXIT, stats=stats, **how)
    assert stats.drafts.acceptance == 1
    # 16 tokens after the first, 4 at a time.
    assert [e.verifications for e in stats.drafts.completions] == [4] * 3
    if sampling is GREEDY:
        same(done, generate(model, PROMPTS[:3], GREEDY, **how))


def test_a_draft_that_never_agrees_costs_time_only(monkeypatch):
    best = draft_verify.most_likely

    def next_to_it(logits):
        token, logprob = best(logits)
        return (token + 1) % logits.shape[-1], logprob

    monkeypatch.setattr(draft_verify, "most_likely", next_to_it)
    stats = Stats()
    # Compiled with the patch: no other test may have this number of tokens.
    never = SelfSpeculation(exit_layer=LAYERS, tokens=5)
    same(generate(tiny(), PROMPTS, GREEDY, speculation=never, stats=stats, **HOW), full())
    assert stats.drafts.acceptance == 0 and stats.drafts.tokens_per_verification == 1


def test_one_slot():
    how = HOW | {"slots": 1, "stream": lambda delta: None}  # In shorter chunks.
    same(generate(tiny(), PROMPTS, GREEDY, speculation=EXIT, **how), full())


def test_limits_stops_and_streams_are_kept():
    model = identity_above(2)  # Long accepted drafts, which limits and stops cut.
    requests = [
        Request(
            tokens=tuple(PROMPTS[i]), prompt_index=i, max_new_tokens=new, sampling=GREEDY,
            ignore_eos=True,
        )
        for i, new in enumerate((1, 2, 4, 6, 17, 40))
    ]  # fmt: skip
    same(run(model, requests, slots=1, chunk=4, speculation=EXIT), run(model, requests, slots=3))
    stop = ["ld", " wor", "b"]
    want = generate(model, PROMPTS, GREEDY, stop=stop, **HOW)
    assert "stop" in {c.finish_reason for c in want}
    pieces = {i: "" for i in range(6)}

    def stream(delta):
        pieces[delta.prompt_index] += delta.text

    how = HOW | {"slots": 1, "stop": stop, "stream": stream}
    same(generate(model, PROMPTS, GREEDY, speculation=EXIT, **how), want)
    assert pieces == {c.prompt_index: c.text for c in want}


@pytest.mark.parametrize("scope", SCOPES)
def test_the_models_own_choice_drafts(scope):
    ours = SelfSpeculation(tokens=3)
    for keep, draft in (((True, True, False), EXIT), ((True, False, True), SET)):
        model, stats = routed(scope, keep), Stats()
        assert static_set(model.depth) == keep
        assert ours.plan(model, [])[2] == draft.plan(tiny(), [])[2]
        same(generate(model, PROMPTS, GREEDY, speculation=ours, stats=stats, **HOW), full())
        assert {e.layers for e in stats.drafts.completions} == {keep}
    model = routed(scope)
    assert static_set(model.depth) is None
    for batching in ("union", "group"):
        stats = Stats()
        how = dict(speculation=ours, batching=batching, stats=stats, **HOW)
        same(generate(model, PROMPTS, GREEDY, **how), full())
        assert len({e.layers for e in stats.drafts.completions}) > 1
    # A draft that is named is taken in place of the routers.
    same(generate(model, PROMPTS, GREEDY, speculation=EXIT, skip_scope=scope, **HOW), full())
    same(generate(model, PROMPTS, GREEDY, speculation=SET, skip_scope=scope, **HOW), full())


def test_samples_follow_from_their_key_and_greedy_rows_stay_greedy():
    def ask(order, seed=11, **how):
        requests = [
            Request(
                tokens=tuple(PROMPTS[i]), prompt_index=i, sample_index=j, max_new_tokens=6 + 3 * i,
                sampling=(WARM, GREEDY)[j],
            )
            for i in order
            for j in range(2)
        ]  # fmt: skip
        done = run(tiny(), requests, seed=seed, speculation=SET, **how)
        return {(c.prompt_index, c.sample_index): c for c in done}

    want = ask(range(6), slots=3)
    again = ask(reversed(range(6)), slots=3)
    assert {k: plain([c]) for k, c in again.items()} == {k: plain([c]) for k, c in want.items()}
    other = ask(range(6), slots=3, seed=12)
    assert any(other[i, 0].tokens != want[i, 0].tokens for i in range(6))
    for (i, j), c in want.items():
        if j:
            expected = generate(tiny(), PROMPTS, GREEDY, **(HOW | {"max_new_tokens": 6 + 3 * i}))[i]
            assert c.tokens == expected.tokens and not any(c.sampling_logprobs)
            continue
        table = full_logprobs(tiny(), [*PROMPTS[i], *c.tokens])[len(PROMPTS[i]) - 1 : -1]
        np.testing.assert_allclose(c.logprobs, table[np.arange(len(c.tokens)), c.tokens], atol=2e-5)
        assert not np.allclose(c.logprobs, c.sampling_logprobs)
        assert c.finish_reason == ("eos" if c.tokens[-1] in EOS_IDS else "length")


def state_after(plan):
    """Slots after a call of the token loop with drafts, or of the plain one."""
    cfg, skips = tiny().config, plan is not None and plan.exit_layer is None
    params = device.prepare_params(tiny().params, cfg, jnp.float32, 3)
    state = device.empty_slots(cfg, 3, 64, "float32", skips)
    rows = np.stack([np.resize(p, 16) for p in PROMPTS[:3]]).astype(np.int32)
    counts = np.array([len(p) for p in PROMPTS[:3]], np.int32)
    cache, logits = device.empty_prompts(cfg, 3, 16, "float32")
    cache, logits, _ = device.extend(
        params, cache, logits, rows, counts, cfg=cfg, dtype="float32", empty=True
    )
    entrants = device.Entrants(
        number=jnp.int32(3), source=np.arange(3), slot=np.arange(3),
        prompt_index=np.arange(3), sample_index=np.zeros(3, np.int32), limit=np.full(3, 99),
        ignore_eos=np.ones(3, bool), sampling=stack_settings([GREEDY] * 3),
        keep=np.tile([True, False, True], (3, 1)) if skips else None,
    )  # fmt: skip
    eos, no = jnp.full(3, -1, jnp.int32), jnp.bool_(False)
    state, _ = device.admit(state, cache, logits, entrants, jax.random.key(0), eos)
    how = dict(cfg=cfg, dtype="float32", chunk=16)
    if plan is None:
        return device.decode(params, state, eos, no, **how)
    return draft_verify.decode(params, state, eos, no, plan=plan, **how)


@pytest.mark.parametrize("exit_layer", [2, None], ids=["exit", "set"])
def test_the_cache_is_the_full_models(exit_layer):
    want, _ = state_after(None)
    state, decoded = state_after(DraftPlan(3, exit_layer, False))
    lengths = np.array([len(p) for p in PROMPTS[:3]]) + np.asarray(decoded.number)
    assert len(set(decoded.number.tolist())) > 1, "rows should accept different numbers"
    np.testing.assert_array_equal(state.cache.lengths, lengths)
    kv_cache.require_complete(state.cache)
    for got, ours in zip((*state.cache.k, *state.cache.v), (*want.cache.k, *want.cache.v)):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(got[row, :, :length], ours[row, :, :length], atol=2e-5)


def test_drafting_and_verifying_copy_no_cache():
    cfg, batch, exit_layer = tiny_model().config, 1, 1
    params = device.prepare_params(tiny_model().params, cfg, jnp.float32, batch)
    state = device.empty_slots(cfg, batch, 48, "float32")
    lowered = draft_verify.decode.lower(
        params, state, jnp.zeros(1, jnp.int32), jnp.bool_(False), cfg=cfg, dtype="float32",
        chunk=8, plan=DraftPlan(2, exit_layer, False),
    )  # fmt: skip
    text, shape = lowered.compile().as_text(), rf"= f32\[{batch},2,48,8\]\S* "
    assert len(re.findall(shape, text)) > 4
    assert not re.findall(shape + r"(copy|select|transpose|concatenate)\(", text)


def test_one_program_for_all_sets():
    generate(tiny(), PROMPTS, GREEDY, speculation=SET, **HOW)
    before = draft_verify.decode._cache_size()
    for keep in ((False, True, True), (False, False, True)):
        other = SelfSpeculation(layers=keep, tokens=3)
        same(generate(tiny(), PROMPTS, GREEDY, speculation=other, **HOW), full())
    assert draft_verify.decode._cache_size() == before


def test_what_cannot_be_drafted_is_told_in_a_line():
    for message, speculation, how in (
        ("0 draft tokens", SelfSpeculation(exit_layer=2, tokens=0), {}),
        ("exit layer 5: expected 1 to 3", SelfSpeculation(exit_layer=5), {}),
        ("give one", SelfSpeculation(exit_layer=1, layers=(True,) * 3), {}),
        ("4 truth values; the model has 3", SelfSpeculation(layers=(True,) * 4), {}),
        ("which layers draft", SelfSpeculation(), {}),
        ("the full model's text", EXIT, {"keep": (True,) * 3}),
    ):
        with pytest.raises(UserError, match=message) as error:
            generate(tiny(), [[1]], GREEDY, speculation=speculation, **how)
        assert "\n" not in str(error.value)


def test_the_flags(monkeypatch, capsys):
    monkeypatch.setattr(cli, "compilation_cache", lambda: None)
    models = {"plain": tiny(), "front": routed("decode_only", (True, True, False))}
    monkeypatch.setattr(cli, "open_model", lambda path, dtype: models[path])

    def call(*argv, model="plain"):
        code = cli.main([f"--checkpoint={model}", "--prompt=One", "--max_new_tokens=40", *argv])
        return code, *capsys.readouterr()

    _, want, err = call()
    assert "draft" not in err
    for model, argv in (
        ("plain", ["--exit_layer=2", "--logprobs"]),
        ("plain", ["--draft_layers=0-1"]),
        ("front", []),
    ):
        code, out, err = call(
            "--self_speculative", "--draft_tokens=3", "--draft_stats", *argv, model=model
        )
        assert code == 0 and out.startswith(want.rstrip("\n"))
        assert "  ##.\n" in err and "tokens a verification" in err
    for argv in (
        ["--exit_layer=2"],
        ["--draft_stats"],
        ["--draft_tokens=2"],
        ["--self_speculative", "--keep_layers=0"],
        ["--self_speculative", "--skip_stats"],
        ["--self_speculative", "--exit_layer=1", "--draft_layers=0"],
        ["--self_speculative", "--exit_layer=1", "--draft_tokens=0"],
        ["--self_speculative", "--exit_layer=9"],
        ["--self_speculative", "--draft_layers=9"],
        ["--self_speculative", "--exit_layer=1", "--batching=group"],
        ["--self_speculative", "--draft_layers=0", "--batching=group"],
        ["--skip=off", "--batching=group"],
        ["--self_speculative"],
    ):
        code, out, err = call(*argv)
        assert code == 2 and not out, argv
        assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
