"""Tokenizers: lossless round trips, fingerprints, and one-line errors for wrong files."""

import json
import pathlib
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxreason.core import text as text_lib
from jaxreason.core.errors import UserError

STORIES = pathlib.Path(__file__).parents[1] / "fixtures/text"

CODE = 'def f(x):\n\n    if x:\n\t\treturn  "a"  # b\r\n        y = 12345\n'
HARD = [
    "",
    " ",
    "  \n\n  ",
    " x ",
    CODE,
    "\u2581a\u2581 \u2581\u2581b\u2581",
    "<0x41></s><unk><|endoftext|> \u2047",
    "\ufeff\u2028e\u0301\u00e9\u00a0\x00\x7f\U0001f600\ud7ff\U0010ffff",
]


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return [path.read_text() for path in sorted(STORIES.glob("*.txt"))] + [CODE * 20]


@pytest.fixture(scope="module")
def hf_json(stories) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|begin|>", "<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(stories[:10], trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    return tokenizer.to_str()


@pytest.fixture(params=["bytes", "bpe", "unigram", "hf"])
def tokenizer(request, stories, hf_json):
    if request.param == "bytes":
        return text_lib.ByteTokenizer()
    if request.param == "hf":
        return text_lib.HfTokenizer(hf_json, eos="<|endoftext|>", bos="<|begin|>")
    return text_lib.train_sentencepiece(stories[:8], 350, model_type=request.param)


def test_round_trips_and_special_ids(tokenizer, stories):
    rng = random.Random(0)
    points = [
        *range(0x20, 0x250),
        *range(0x2570, 0x2590),
        *range(0x4E00, 0x4E40),
        0xA,
        0x9,
        0x1F600,
    ]
    noise = ["".join(map(chr, rng.choices(points, k=60))) for _ in range(200)]
    texts = HARD + noise + stories[:3] + stories[-1:]
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(np.array(ids, np.int32)) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eos_id not in ids and tokenizer.bos_id not in ids
    ids = tokenizer.encode("ab")
    ends = [tokenizer.eos_id, tokenizer.vocab_size, tokenizer.vocab_size + 99, -1]
    assert tokenizer.decode([*ids, *ends]) == "ab"
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    assert len(tokenizer.fingerprint) == 64


def test_saved_tokenizers_load_as_themselves(tokenizer, tmp_path):
    cfg = tokenizer.save(tmp_path / "deep/folder")
    again = text_lib.make_tokenizer(
        cfg, train_texts=lambda: pytest.fail("trained"), cache_dir=tmp_path, corpus_sha256=""
    )
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(CODE) == tokenizer.encode(CODE)


def test_bytes_are_the_ids():
    tokenizer = text_lib.ByteTokenizer()
    assert tokenizer.encode("\u00e9\n") == [0xC3, 0xA9, 0x0A]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (257, 256, None)
    every = [*range(256), 256, 999]
    assert tokenizer.decode_bytes(every) == bytes(range(256))
    assert tokenizer.decode([0xC3, 256, 0x41]) == "\ufffdA"


def test_sentencepiece_training_is_deterministic_and_compresses(stories):
    train = text_lib.train_sentencepiece
    one, other = train(stories, 512), train(reversed(stories), 512)
    assert one.fingerprint == other.fingerprint
    assert one.vocab_size == 512 and one.bos_id is None
    text = stories[0]
    assert len(one.encode(text)) < 0.5 * len(text)
    assert len(one.encode("1234")) == 4
    assert len({train(stories, 400, seed=s, max_bytes=30_000).fingerprint for s in (0, 0, 1)}) == 2


def test_indentation_is_a_token(stories):
    code = [f"if a{i}:\n        b = {i}\n" for i in range(500)]
    tokenizer = text_lib.train_sentencepiece(stories + code, 600)
    assert len(tokenizer.encode(" " * 8)) == 1
    assert len(tokenizer.encode(" " * 8 + "b =")) <= 3


def test_sentencepiece_symbols_are_one_token(stories):
    tokenizer = text_lib.train_sentencepiece(stories[:5], 400, symbols=("<think>", "\n\n"))
    assert len(tokenizer.encode("<think>\n\n")) == 2
    assert tokenizer.decode(tokenizer.encode("a<think>\n\nb")) == "a<think>\n\nb"


def test_a_trained_tokenizer_is_cached_by_corpus_and_settings(stories, tmp_path):
    calls = []

    def make(corpus: str, size: int):
        def texts():
            calls.append((corpus, size))
            return stories[:5]

        cfg = text_lib.SentencePiece(train_vocab_size=size)
        return text_lib.make_tokenizer(
            cfg, train_texts=texts, cache_dir=str(tmp_path / "cache"), corpus_sha256=corpus
        )

    first = make("a", 320)
    assert make("a", 320).fingerprint == first.fingerprint
    make("b", 320)
    make("a", 321)
    assert calls == [("a", 320), ("b", 320), ("a", 321)]
    assert len(list((tmp_path / "cache").iterdir())) == 3  # and no temporary file


@pytest.mark.parametrize(
    ("size", "texts", "says"),
    [
        (100_000, ["hello world " * 50], "too large for the text given, expected"),
        (100, ["hello world " * 50], "too small for the text given, expected"),
        (300, [], "no text to train"),
    ],
)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_settings_that_do_not_fit(size, texts, says, kind, tmp_path):
    with pytest.raises(UserError) as error:
        text_lib.train_sentencepiece(texts, size, tmp_path / "m.model", model_type=kind)
    assert says in one_line(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, b"", b"no model", b"\x0a\xff\xff\xff\xff"])
def test_sentencepiece_files_that_are_none(content, tmp_path):
    path = tmp_path / "x.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        text_lib.load_sentencepiece(path)
    assert "x.model" in one_line(error)


def test_a_truncated_sentencepiece_model_is_seen(stories, tmp_path):
    model = epath_of(text_lib.train_sentencepiece(stories[:5], 320).save(tmp_path))
    model.write_bytes(model.read_bytes()[:-7])
    with pytest.raises(UserError, match="not a SentencePiece model"):
        text_lib.load_sentencepiece(model)


def epath_of(cfg: text_lib.SentencePiece) -> pathlib.Path:
    return pathlib.Path(cfg.model)


def test_special_tokens_in_a_text_are_text_unless_asked(hf_json):
    text = "a<|endoftext|>b"
    plain = text_lib.HfTokenizer(hf_json, eos="<|endoftext|>")
    parsed = text_lib.HfTokenizer(hf_json, eos="<|endoftext|>", parse_special=True)
    assert plain.eos_id not in plain.encode(text)
    assert parsed.encode(text) == [*plain.encode("a"), plain.eos_id, *plain.encode("b")]
    assert parsed.fingerprint != plain.fingerprint
    assert plain.fingerprint != text_lib.HfTokenizer(hf_json, eos="<|im_end|>").fingerprint


@pytest.mark.parametrize(
    ("name", "fields", "eos", "bos"),
    [
        ("tokenizer_config.json", {"eos_token": "<|im_end|>"}, 2, None),
        (
            "tokenizer_config.json",
            {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|begin|>"},
            1,
            0,
        ),
        ("special_tokens_map.json", {"eos_token": "<|endoftext|>"}, 1, None),
        ("generation_config.json", {"eos_token_id": [2, 1], "bos_token_id": 0}, 2, 0),
        ("config.json", {"eos_token_id": 1}, 1, None),
    ],
)
def test_the_end_of_document_is_found_beside(hf_json, tmp_path, name, fields, eos, bos):
    (tmp_path / "tokenizer.json").write_text(hf_json)
    (tmp_path / name).write_text(json.dumps(fields))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = text_lib.load_hf_json(text_lib.HfJson(path=str(path)))
        assert (tokenizer.eos_id, tokenizer.bos_id) == (eos, bos)


def test_ids_with_a_hole_count_to_the_largest(hf_json):
    fields = json.loads(hf_json)
    last = max(fields["model"]["vocab"], key=fields["model"]["vocab"].get)
    fields["model"]["vocab"][last] = 999
    tokenizer = text_lib.HfTokenizer(json.dumps(fields), eos="<|endoftext|>")
    assert tokenizer.vocab_size == 1000
    assert tokenizer.decode([*tokenizer.encode("ab"), 998]) == "ab"


@pytest.mark.parametrize(
    ("files", "cfg", "says"),
    [
        ({}, {}, "no file"),
        ({"tokenizer.json": "{}"}, {"eos": "x"}, "not a Hugging Face tokenizer"),
        ({"tokenizer.json": "{"}, {"eos": "x"}, "not a Hugging Face tokenizer"),
        ({"tokenizer.json": "{", "config.json": '{"eos_token_id": 1}'}, {}, "not a Hugging Face"),
        ({"tokenizer.json": None}, {}, "set eos"),
        ({"tokenizer.json": None, "config.json": "{"}, {}, "config.json' is not JSON"),
        ({"tokenizer.json": None}, {"eos": "<|endoftxt|>"}, "did you mean '<|endoftext|>'"),
        ({"tokenizer.json": None}, {"eos": "<|im_end|>", "bos": "<s>"}, "has no token '<s>'"),
    ],
)
def test_hf_files_that_are_not_right(hf_json, tmp_path, files, cfg, says):
    for name, content in files.items():
        (tmp_path / name).write_text(hf_json if content is None else content)
    with pytest.raises(UserError) as error:
        text_lib.load_hf_json(text_lib.HfJson(path=str(tmp_path), **cfg))
    assert says in one_line(error)
