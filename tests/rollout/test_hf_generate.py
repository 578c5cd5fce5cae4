"""Greedy text of every family is that of transformers.generate, token for token."""

import functools

import numpy as np
import pytest
from goldens import open_family

from benchmarks import parity
from jaxreason.rollout import GREEDY, generate

# `benchmarks.parity` does so for the other settings in that folder; compiling takes seconds each.
FAMILIES = (
    "gpt_neox", "llama", "llama_llama3_rope", "olmoe", "opt_post", "opt_pre", "qwen2", "qwen3",
    "smollm2",
)  # fmt: skip


# Kept, since several tests read them, until the last one here is done.
opened = functools.cache(open_family)


@pytest.fixture(scope="module", autouse=True)
def release():
    yield
    opened.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_of_ragged_prompts(family):
    model, ref = opened(family)
    prompts = parity.sequences_of(ref["prompts"], ref["prompt_lengths"])
    done = generate(
        model, prompts, GREEDY, max_new_tokens=ref["greedy"].shape[1], ignore_eos=True, slots=2
    )
    assert [c.tokens for c in done] == ref["greedy"].tolist()
    assert {c.finish_reason for c in done} == {"length"}


@pytest.mark.parametrize("family", ["llama", "opt_post", "olmoe"])
def test_the_end_token_of_the_folder_ends_a_text(family):
    model, ref = opened(family)
    assert model.eos_ids == (int(ref["eos_id"]),)
    prompts = parity.sequences_of(ref["prompts"], ref["prompt_lengths"])
    done = generate(model, prompts, GREEDY, max_new_tokens=ref["greedy"].shape[1])
    ended = 0
    for completion, expected in zip(done, ref["greedy"].tolist()):
        at = expected.index(model.eos_ids[0]) + 1 if model.eos_ids[0] in expected else None
        assert completion.tokens == expected[:at]
        assert completion.finish_reason == ("length" if at is None else "eos")
        ended += at is not None
    assert ended


def test_log_probabilities_are_those_of_the_whole_forward():
    model, ref = opened("qwen2")  # Windowed from its second block on.
    prompts = parity.sequences_of(ref["prompts"], ref["prompt_lengths"])
    new = ref["greedy"].shape[1]
    done = generate(model, prompts, GREEDY, max_new_tokens=new, ignore_eos=True, logprobs=True)
    whole = [[prompt + c.tokens] for prompt, c in zip(prompts, done)]
    batch = parity.batch_of(whole, max(len(row[0]) for row in whole))
    logits = parity.forward(model, batch)["logits"]
    found = parity.log_softmax(logits)
    at = 0
    for prompt, c in zip(prompts, done):
        places = at + len(prompt) - 1 + np.arange(new)
        np.testing.assert_allclose(c.logprobs, found[places, c.tokens], atol=1e-5, rtol=0)
        at += len(prompt) + new
