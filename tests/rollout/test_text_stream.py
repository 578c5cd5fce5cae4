"""Streamed text: whole characters, nothing of a stop string, the same text in the end."""

import pathlib
import random

import pytest
import tokenizers
from rollout_model import PieceTokenizer, greedy, ragged_prompts, tiny_model
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxreason.core import text as text_lib
from jaxreason.rollout import GREEDY, Sampling, generate, prepare
from jaxreason.rollout.text_stream import Detokenizer, StopBuffer

STORIES = pathlib.Path(__file__).parents[1] / "fixtures/text"
HALVES = str.maketrans("", "", "\ufffd\u20ac")
TEXTS = [
    "plain words, and  two spaces\n\nand lines",
    "caf\u00e9 \u20ac5 \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \ud55c\uad6d\uc5b4 x",
    " \u00e9",
    "e\u0301\u0327 tail \U0001f600",
]


@pytest.fixture(scope="module", params=["bytes", "byte-level BPE", "byte fallback"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return text_lib.ByteTokenizer()
    stories = [path.read_text() for path in sorted(STORIES.glob("*.txt"))[:10]]
    if request.param == "byte fallback":
        path = tmp_path_factory.mktemp("spm") / "t.model"
        return text_lib.train_sentencepiece(stories, 400, path)
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(stories, trainer)
    return text_lib.HfTokenizer(bpe.to_str(), eos="<e>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "Once", "a \u20ac"])
def test_pieces_add_up_to_the_text(tokenizer, text, prompt):
    tokens, before = tokenizer.encode(text), tokenizer.encode(prompt)
    stream = Detokenizer(tokenizer.decode, before)
    pieces = [stream.add(token) for token in tokens]
    assert "\ufffd" not in "".join(pieces)
    whole = tokenizer.decode([*before, *tokens])
    assert "".join(pieces) == whole[len(tokenizer.decode(before)) :]
    assert sum(bool(p) for p in pieces) > len(tokens) // 4, "text should come as it is made"


def test_an_unfinished_character_at_the_end_is_not_shown(tokenizer):
    tokens = tokenizer.encode("ab\U0001f600")
    # The last token is a byte of the character where the tokenizer has no token for it.
    stream = Detokenizer(tokenizer.decode)
    assert "".join(stream.add(t) for t in tokens[:-1]) == "ab"


def test_what_is_no_text_shows_and_does_not_wait_for_ever():
    tokens = [97, *[0xFF] * 50, 98, 0xE2, 0x82, 0xAC, 0x80, 99, 0xE2]
    decode = text_lib.ByteTokenizer().decode
    stream, shown = Detokenizer(decode), ""
    for i, token in enumerate(tokens):
        shown += stream.add(token)
        assert decode(tokens[: i + 1]).startswith(shown)
        assert len(decode(tokens[: i + 1])) - len(shown) <= 3
    assert shown == decode(tokens)[:-1]


def test_random_bytes_stream_as_they_decode():
    random.seed(0)
    decode = text_lib.ByteTokenizer().decode
    for _ in range(100):
        alphabet = [0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF]
        tokens = [random.choice(alphabet) for _ in range(60)] + [0x42]
        stream = Detokenizer(decode)
        assert "".join(stream.add(t) for t in tokens) == decode(tokens)


def test_a_piece_costs_the_decoding_of_a_few_tokens():
    asked = []

    def decode(ids):
        asked.append(len(ids))
        return text_lib.ByteTokenizer().decode(ids)

    stream = Detokenizer(decode, [97] * 1000)
    for token in b"words and more " * 50:
        stream.add(token)
    assert max(asked) < 10


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "hit"),
    [
        (("END",), ["he said E", "N", "D and on"], "he said ", True),
        (("END",), ["E", "E", "N", "E", "ND"], "EEN", True),
        (("END",), ["EN", "x", "EN"], "ENxEN", False),
        (("\n\n", "User:"), ["a\n", "b\nUse", "r", ": x"], "a\nb\n", True),
        (("abcd", "bc"), ["xa", "b", "c", "d"], "xa", True),
        (("b", "ab"), ["ab"], "", True),
        ((), ["any", "thing"], "anything", False),
        (("",), ["x"], "x", False),
    ],
)
def test_stop_strings(stops, pieces, shown, hit):
    buffer, text = StopBuffer(stops), ""
    for piece in pieces:
        text += buffer.add(piece)
        assert shown.startswith(text), "part of a stop string was shown"
        if buffer.hit:
            break
    assert text + buffer.end() == shown and buffer.hit is hit


def test_a_stop_string_ends_a_reply_and_is_never_streamed():
    model, tokenizer = prepare(tiny_model()), PieceTokenizer()
    prompts = ragged_prompts(6)
    whole = [greedy(model, p, 24) for p in prompts]
    texts = [tokenizer.decode(t[:-1] if t[-1] in model.eos_ids else t) for t in whole]
    # Strings that are in the texts, and whose parts are in two tokens or three.
    stop = ("\u20acb", "oD", "\u20aca")
    streamed = {}

    def show(delta):
        streamed.setdefault(delta.prompt_index, []).append(delta)

    done = generate(
        model, prompts, GREEDY, max_new_tokens=24, stop=stop, slots=2, stream=show
    )  # fmt: skip
    reasons = set()
    for c, tokens, text in zip(done, whole, texts):
        deltas = streamed[c.prompt_index]
        assert "".join(d.text for d in deltas) == c.text
        assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + [c.finish_reason]
        assert c.tokens == tokens[: len(c.tokens)]
        assert not any(s in c.text for s in stop)
        reasons.add(c.finish_reason)
        if c.finish_reason == "stop":
            # One token fewer, and the stop string is not complete.
            assert any(s in tokenizer.decode(c.tokens) for s in stop)
            assert not any(s in tokenizer.decode(c.tokens[:-1]) for s in stop)
        else:
            assert c.tokens == tokens
            # The prompt may have ended inside a character, and so may the reply.
            assert c.text.translate(HALVES) == text.translate(HALVES)
    assert reasons == {"stop", "length", "eos"}


def test_a_stopped_slot_serves_the_next_request():
    model = prepare(tiny_model())
    prompts = ragged_prompts(6)
    sampling = Sampling(temperature=0.9)
    how = dict(max_new_tokens=24, stop=("a", "he", " "), seed=3)
    alone = generate(model, prompts, sampling, slots=6, **how)
    refilled = generate(model, prompts, sampling, slots=2, **how)
    assert [c.tokens for c in alone] == [c.tokens for c in refilled]
    assert [c.text for c in alone] == [c.text for c in refilled]


def test_cancelling_ends_all():
    model, seen = prepare(tiny_model()), []
    done = generate(
        model, ragged_prompts(4), GREEDY, max_new_tokens=200, ignore_eos=True, slots=2,
        stream=seen.append, cancel=lambda: len(seen) > 6,
    )  # fmt: skip
    assert {c.finish_reason for c in done} == {"cancelled"}
    assert any(0 < len(c.tokens) < 60 for c in done) and not done[-1].tokens
