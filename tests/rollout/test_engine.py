"""Generation against recomputation; slots, refilling, samples, limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_model import EOS_IDS, full_logprobs, greedy, ragged_prompts, tiny_model

from jaxreason.core.errors import UserError
from jaxreason.rollout import GREEDY, Request, Sampling, Stats, engine, generate, prepare, run
from jaxreason.rollout import prompts as reading
from jaxreason.rollout import slots as device
from jaxreason.rollout.requests import encode_prompts

# Most of a test's time is compiling: three slots nearly everywhere, so that programs are shared.
PROMPTS = ragged_prompts(7)
WARM = Sampling(temperature=0.8, top_p=0.95)


@pytest.fixture(scope="module")
def model():
    return prepare(tiny_model())


def plain(done):
    return [(c.prompt_index, c.sample_index, c.tokens, c.text, c.finish_reason) for c in done]


def test_greedy_with_the_cache_equals_argmax_over_full_recomputation(model):
    done = generate(model, PROMPTS, GREEDY, max_new_tokens=20, slots=3, logprobs=True)
    assert [c.prompt_index for c in done] == list(range(7))
    for c, prompt in zip(done, PROMPTS):
        want = greedy(tiny_model(), prompt, 20)
        assert c.tokens == want
        assert c.finish_reason == ("eos" if want[-1] in EOS_IDS else "length")
        assert c.sampling_logprobs == [0.0] * len(want)
    assert len({len(c.tokens) for c in done}) > 1, "some reply should end early"


@pytest.mark.parametrize(
    "changes",
    [{"window": 5}, {"qkv_bias": True, "tie_embeddings": True}, {"logit_soft_cap": 3.0}],
    ids=str,
)
def test_greedy_of_other_shapes(changes):
    model = prepare(tiny_model(**changes), 2)
    if changes.get("tie_embeddings"):
        assert model.params["embed"] is model.params["unembed"].pieces[0]
    prompts = [p[-16:] for p in PROMPTS[1:4]]
    done = generate(model, prompts, GREEDY, max_new_tokens=12, slots=2)
    assert [c.tokens for c in done] == [greedy(tiny_model(**changes), p, 12) for p in prompts]


def test_a_sampled_tokens_logprob_is_that_of_the_training_forward(model):
    done = generate(model, PROMPTS, WARM, max_new_tokens=24, n=2, slots=3, logprobs=True)
    worst = 0.0
    for c in done:
        prompt = PROMPTS[c.prompt_index]
        table = full_logprobs(tiny_model(), [*prompt, *c.tokens])[len(prompt) - 1 : -1]
        want = table[np.arange(len(c.tokens)), c.tokens]
        worst = max(worst, np.abs(want - c.logprobs).max())
        assert not np.allclose(c.logprobs, c.sampling_logprobs)
    assert worst < 1e-5


def test_weights_that_bfloat16_holds_lie_in_it_and_the_numbers_stay_those_of_float32():
    plain = tiny_model()
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), plain.params)
    rounded = dataclasses.replace(plain, params=params)
    model = prepare(rounded)
    pieces = [*jax.tree.leaves(model.params["blocks"][0]["mlp"]), *model.params["unembed"].pieces]
    assert {p.dtype for p in pieces} == {jnp.dtype(jnp.bfloat16)}
    others = prepare(plain).params["blocks"][0]["mlp"]
    assert {p.dtype for p in jax.tree.leaves(others)} == {jnp.dtype(jnp.float32)}
    for c in generate(model, PROMPTS[:3], WARM, max_new_tokens=16, slots=1, logprobs=True):
        prompt = PROMPTS[c.prompt_index]
        table = full_logprobs(rounded, [*prompt, *c.tokens])[len(prompt) - 1 : -1]
        want = table[np.arange(len(c.tokens)), c.tokens]
        np.testing.assert_allclose(c.logprobs, want, atol=1e-5, rtol=0)


def test_slots_chunks_order_and_company_change_nothing(model):
    def ask(order, **how):
        requests = [
            Request(
                tokens=tuple(PROMPTS[i]), prompt_index=i, sample_index=j, max_new_tokens=5 + 3 * i,
                sampling=(WARM, GREEDY, Sampling(top_k=9))[(i + j) % 3],
            )
            for i in order
            for j in range(2)
        ]  # fmt: skip
        done = run(model, requests, seed=11, **how)
        return {(c.prompt_index, c.sample_index): plain([c]) for c in done}

    want = ask(range(7), slots=14, chunk=32)
    assert ask(range(7), slots=3) == want
    assert ask(reversed(range(7)), slots=3) == want
    few = ask([5, 2], slots=3)
    assert few == {key: value for key, value in want.items() if key[0] in (5, 2)}
    assert want[0, 0] != want[0, 1]


def test_samples_of_a_prompt_share_its_prefill(model):
    stats = Stats()
    done = generate(model, [PROMPTS[1]], WARM, max_new_tokens=8, n=5, slots=3, stats=stats)
    assert stats.prefill_tokens == len(PROMPTS[1])
    assert len({tuple(c.tokens) for c in done}) > 1
    again = generate(model, [PROMPTS[1]], WARM, max_new_tokens=8, n=3, slots=3)
    assert plain(again) == plain(done[:3])
    other = generate(model, [PROMPTS[1]], WARM, max_new_tokens=8, n=3, slots=3, seed=1)
    assert plain(again) != plain(other)


def test_the_cache_grows_in_powers_of_two(model, monkeypatch):
    monkeypatch.setattr(engine, "HEADROOM", 4)
    seen, grow = [], device.grow
    monkeypatch.setattr(device, "grow", lambda s, n: seen.append(n) or grow(s, n))
    requests = [
        Request(tokens=tuple(p), prompt_index=i, max_new_tokens=40, sampling=GREEDY)
        for i, p in enumerate(([3], [4, 5]))
    ]
    done = run(model, [dataclasses.replace(r, ignore_eos=True) for r in requests], chunk=8)
    assert seen == [32, 64]
    for c in done:
        want = greedy(
            dataclasses.replace(tiny_model(), eos_ids=()), requests[c.prompt_index].tokens, 40
        )
        assert c.tokens == want


def test_few_programs_serve_many_lengths(model):
    before = {name: getattr(device, name)._cache_size() for name in ("extend", "admit", "decode")}
    prompts = ragged_prompts(24, seed=5, longest=32)
    generate(model, prompts, WARM, max_new_tokens=6, slots=3)
    new = {name: getattr(device, name)._cache_size() - n for name, n in before.items()}
    # Two lengths of prompts (16, 32) times the batch sizes 1 and 4; one token loop.
    assert new["extend"] <= 4 and new["admit"] <= 4 and new["decode"] <= 1, new


def test_long_prompts_are_read_in_pieces(model, monkeypatch):
    want = generate(model, PROMPTS[2:6], GREEDY, max_new_tokens=6, slots=3)
    monkeypatch.setattr(reading, "PIECE", 8)
    assert plain(generate(model, PROMPTS[2:6], GREEDY, max_new_tokens=6, slots=3)) == plain(want)


@pytest.mark.parametrize("rows", range(1, 40))
def test_groups_of_prompts_add_up(rows):
    groups = list(reading.row_groups(rows))
    assert sum(groups) == rows and set(groups) <= {1, 4, 16}


def test_buckets():
    assert [reading.bucket(n) for n in (1, 16, 17, 32, 33, 1000)] == [16, 16, 32, 32, 64, 1024]


def test_without_a_tokenizer_tokens_go_in_and_come_out(model):
    bare = dataclasses.replace(model, tokenizer=None)
    got = generate(bare, PROMPTS[3:6], GREEDY, max_new_tokens=4, slots=3)
    want = generate(model, PROMPTS[3:6], GREEDY, max_new_tokens=4, slots=3)
    assert [c.tokens for c in got] == [c.tokens for c in want]
    assert {c.text for c in got} == {""}
    for bad in ({"prompts": ["text"]}, {"prompts": [[1]], "stop": ["x"]}):
        with pytest.raises(UserError, match="no tokenizer"):
            generate(bare, **bad)


def test_what_cannot_be_served_is_told_in_a_line(model):
    limited = dataclasses.replace(model, config=_Learned(8))
    for message, call in {
        "empty": lambda: generate(model, [[]]),
        "token 64": lambda: generate(model, [[64]]),
        "max_new_tokens is 0": lambda: generate(model, [[1]], max_new_tokens=0),
        "slots is 0": lambda: generate(model, [[1]], slots=0),
        "top_k is -1": lambda: generate(model, [[1]], Sampling(top_k=-1)),
        "has 8 positions": lambda: generate(limited, [[1] * 5], max_new_tokens=4),
    }.items():
        with pytest.raises(UserError, match=message):
            call()
    assert generate(model, []) == []


@dataclasses.dataclass(frozen=True)
class _Learned:
    max_positions: int
    vocab_size: int = 64
    positions: str = "learned"


def test_a_beginning_of_text_token_stands_in_front_once(model):
    with_bos = dataclasses.replace(model, bos_id=7)
    written = bytes([67]).decode() + "hi"  # The token written out: encodes to 7.
    assert model.tokenizer.encode(written)[0] == 7
    tokens = (7, *model.tokenizer.encode("hi"))
    assert encode_prompts(with_bos, ["hi", written, list(tokens[1:])]) == [
        tokens,
        tokens,
        tokens[1:],
    ]
    assert encode_prompts(with_bos, [""]) == [(7,)]


def test_bfloat16():
    model, prompt = dataclasses.replace(tiny_model(), dtype="bfloat16"), PROMPTS[1]
    (c,) = generate(model, [prompt], WARM, max_new_tokens=10, logprobs=True)
    table = full_logprobs(tiny_model(), [*prompt, *c.tokens])[len(prompt) - 1 : -1]
    np.testing.assert_allclose(c.logprobs, table[np.arange(len(c.tokens)), c.tokens], atol=0.3)


def test_times_are_kept_apart(model):
    stats = Stats()
    how = dict(max_new_tokens=9, ignore_eos=True, slots=3)
    generate(model, PROMPTS[:3], GREEDY, **how, stats=stats)
    assert stats.prefill_tokens == sum(map(len, PROMPTS[:3])) and stats.decode_tokens == 24
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
    assert "decode 24 tokens" in stats.summary() and "\n" not in stats.summary()
