"""A report's samples are the model's most likely continuations of held-out text."""

import dataclasses
import types

import jax
import numpy as np
from rollout_model import EOS, PieceTokenizer, greedy, tiny_model

from jaxreason.recipes.samples import MARK, write_samples
from jaxreason.train.report import SAMPLE_SEPARATOR


def held_out() -> types.SimpleNamespace:
    rng = np.random.default_rng(0)
    segments = np.ones((4, 16), np.int32)
    segments[1, 5:] = 2  # A row that begins with a short document asks for nothing.
    batch = {"tokens": rng.integers(0, 60, (4, 16)).astype(np.int32), "segment_ids": segments}
    return types.SimpleNamespace(batch=lambda step: batch, tokenizer=PieceTokenizer())


def test_samples_are_greedy_and_end_in_the_report_s_file(tmp_path, monkeypatch):
    model, data = dataclasses.replace(tiny_model(), eos_ids=(EOS,)), held_out()
    more = {"dtype": "float32", "count": 2, "prompt_tokens": 8, "new_tokens": 6}
    got = write_samples(tmp_path, model.params, model.config, data, **more)
    prompts = data.batch(0)["tokens"][[0, 2], :8]
    decode = data.tokenizer.decode
    for text, prompt in zip(got, prompts, strict=True):
        tokens = greedy(model, tuple(map(int, prompt)), 6)
        tokens = tokens[:-1] if tokens[-1] == EOS else tokens
        assert text == f"{decode(prompt)}{MARK}{decode(tokens)}".replace("\f", " ")
    assert (tmp_path / "samples.txt").read_text().split(SAMPLE_SEPARATOR) == got
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert write_samples(tmp_path / "two", model.params, model.config, data, **more) == []
