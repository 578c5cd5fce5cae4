"""A text's ids behind another text: those that a model could write there, for every tokenizer."""

import io
import pathlib

import pytest
import sentencepiece
import tokenizers
from tiny_models import tokenizer as bpe_json
from tokenizers import models, normalizers

from jaxreason.core.text import (
    ByteTokenizer,
    HfTokenizer,
    SentencePieceTokenizer,
    encode_behind,
)

STORIES = pathlib.Path(__file__).parents[1] / "fixtures/text"
BORDERS = [
    ("count the: ", "there"), ("count the:", " there"), ("the t", "he end"), ("a\n", "\n  b"),
    ("a ", "  the b"), ("one", " two"), ("in 12", "345"), ("", "there"), ("the ", "\u2581x"),
]  # fmt: skip


def llama_2(**settings) -> SentencePieceTokenizer:
    """A SentencePiece model as Llama 2's: a space before every text, bytes for what it lacks."""
    texts = [path.read_text() for path in sorted(STORIES.glob("*.txt"))[:4]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines()),
        model_writer=model, vocab_size=500, model_type="bpe", byte_fallback=True,
        split_digits=True, minloglevel=2, num_threads=1,
        **{
            "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True, **settings,
        },
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="module")
def sp() -> SentencePieceTokenizer:
    return llama_2()


def text_of(sp: SentencePieceTokenizer, ids: list[int]) -> str:
    """The text of pieces, whose first space is no other than the rest."""
    return sp.decode([*sp.encode("x"), *ids]).removeprefix("x")


@pytest.mark.parametrize(("before", "text"), BORDERS)
def test_llama_2_s_tokenizer_adds_no_space_behind_a_prompt(before, text, sp):
    assert sp.decode(sp.encode("there")) == "there"  # The space is there all the same:
    assert text_of(sp, sp.encode("there")) == " there"
    got = encode_behind(sp, before, text)
    if not before:  # There too generation writes the space, which a decoder takes away.
        assert got == sp.encode(text)
        return
    assert text_of(sp, got) == text.replace("\u2581", " ")
    whole = sp.encode(before + text)
    if whole[: len(sp.encode(before))] == sp.encode(before):
        assert sp.encode(before) + got == whole


def test_the_hugging_face_form_of_such_a_tokenizer():
    """Its normaliser puts the space in front, written U+2581."""
    characters = "\u2581acehnorstu:"
    vocab = {piece: i for i, piece in enumerate(["</s>", "<unk>", *characters, "he", "\u2581t"])}
    made = tokenizers.Tokenizer(models.BPE(vocab, [("h", "e"), ("\u2581", "t")], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    hf = HfTokenizer(made.to_str(), eos="</s>")

    def pieces(before, text):
        return [made.id_to_token(i) for i in encode_behind(hf, before, text)]

    assert made.encode("there").tokens == ["\u2581t", "he", "r", "e"]
    assert pieces("count: ", "there") == ["t", "he", "r", "e"]
    assert pieces("count:", " there") == pieces("", "there") == ["\u2581t", "he", "r", "e"]


def test_whole_texts_that_fold_spaces(tmp_path):
    """Where spaces at the ends are dropped no text begins with one; a word is still a word."""
    folds = llama_2(remove_extra_whitespaces=True, normalization_rule_name="nmt_nfkc")
    got = encode_behind(folds, "count the: ", "there")
    assert folds.decode([*folds.encode("count the: "), *got]) == "count the: there"


@pytest.mark.parametrize(("before", "text"), BORDERS)
def test_tokenizers_without_such_a_space_go_on_from_the_prompt(before, text):
    bpe = HfTokenizer(bpe_json(), eos="<|im_end|>", parse_special=True)
    for tokenizer in (ByteTokenizer(), bpe):
        got = encode_behind(tokenizer, before, text)
        assert tokenizer.decode(tokenizer.encode(before) + got) == before + text
    ids = bpe.encode("the t") + encode_behind(bpe, "the t", "he end")
    assert ids != bpe.encode("the the end")  # As one text "the" would be one token.
