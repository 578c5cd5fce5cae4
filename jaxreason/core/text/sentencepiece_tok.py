"""SentencePiece tokenizers: read from a model file, or trained on the run's own text."""

import contextlib
import dataclasses
import hashlib
import heapq
import io
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import sentencepiece
from etils import epath

from jaxreason.core.errors import UserError
from jaxreason.core.text.tokenizer import as_ids, sha256_of

_SPACE = "\u2581"
"""SentencePiece writes a space as this character, and so cannot tell the two apart."""

_SPACE_BYTES = tuple(f"<0x{byte:02X}>" for byte in _SPACE.encode())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePiece:
    """A SentencePiece model: a file, or trained on the training split and cached."""

    model: str = ""
    """Path of a `.model` file, local or in a bucket; empty: trained on the training split."""
    train_vocab_size: int = 8192
    """Number of tokens of a trained model, with its 256 bytes, unknown and end of document."""
    train_model_type: Literal["bpe", "unigram"] = "bpe"
    """Algorithm of a trained model; unigram takes some twenty times as long as bpe."""
    train_bytes: int = 32 * 2**20
    """Most text that a model is trained on, bytes; a random sample of documents above that."""
    train_seed: int = 0
    """Seed of that sample."""
    train_symbols: tuple[str, ...] = ()
    """Strings that a trained model always makes one token, such as `<think>`."""


class SentencePieceTokenizer:
    """A SentencePiece model as a tokenizer.

    Models from `train_sentencepiece` are lossless: decode(encode(text)) == text for any text.
    Models made elsewhere keep their own normalisation.

    Raises:
        UserError: `model` is no SentencePiece model, or has no end of document.
    """

    def __init__(self, model: bytes, *, name: str = "the SentencePiece model"):
        processor = sentencepiece.SentencePieceProcessor()
        with contextlib.suppress(RuntimeError):  # what its C++ raises on bytes that do not parse
            processor.LoadFromSerializedProto(model)
        if not processor.vocab_size():
            raise UserError(
                f"{name} is not a SentencePiece model (damaged, or another kind of file); "
                "get it anew, or set model='' to train one"
            )
        if processor.eos_id() < 0:
            raise UserError(
                f"{name} has no end-of-sentence id, expected a model trained with eos_id >= 0; "
                "train it anew with one"
            )
        self._processor = processor
        self._model = model
        self.vocab_size: int = processor.vocab_size()
        self.eos_id: int = processor.eos_id()
        self.bos_id: int | None = processor.bos_id() if processor.bos_id() >= 0 else None
        self.fingerprint: str = sha256_of("sentencepiece", model)
        # Where the model has bytes and adds no space of its own, a text's own U+2581 is written in
        # bytes, as otherwise it would come back as a space.
        space = [processor.piece_to_id(piece) for piece in _SPACE_BYTES]
        adds_space = processor.encode("a", out_type=str)[:1] != ["a"]
        self._space = [] if adds_space or not all(map(processor.is_byte, space)) else space

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without begin or end of document."""
        if self._space and _SPACE in text:
            first, *others = self._processor.encode(text.split(_SPACE))
            return first + [i for part in others for i in (*self._space, *part)]
        return self._processor.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`. Begin, end and ids outside the vocabulary give no text."""
        return self._processor.decode([i for i in as_ids(ids) if 0 <= i < self.vocab_size])

    def save(self, folder: epath.PathLike) -> SentencePiece:
        """Writes `tokenizer.model` into `folder`; returns the config that loads it there."""
        path = epath.Path(folder) / "tokenizer.model"
        _write(path, self._model)
        return SentencePiece(model=str(path))


def load_sentencepiece(path: epath.PathLike) -> SentencePieceTokenizer:
    """Returns the tokenizer of a `.model` file; UserError where it is absent or damaged."""
    try:
        model = epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the SentencePiece model {str(path)!r} ({error.strerror or error}); "
            "expected a .model file; give its path, or set model='' to train one"
        ) from None
    return SentencePieceTokenizer(model, name=repr(str(path)))


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    out_path: epath.PathLike | None = None,
    *,
    model_type: Literal["bpe", "unigram"] = "bpe",
    seed: int = 0,
    max_bytes: int = 32 * 2**20,
    symbols: Sequence[str] = (),
) -> SentencePieceTokenizer:
    """Trains a lossless SentencePiece model, deterministically: one thread, a keyed sample.

    Text is left as it is (no normalisation, no space put in front, runs of spaces kept), digits
    stand alone, and what the vocabulary lacks is written in bytes. Id 0 is unknown (never made),
    id 1 ends a document. The result does not depend on the order of `texts`.

    Args:
        texts: Documents; read once, at most about `max_bytes` of them held.
        vocab_size: Number of tokens.
        out_path: Where to write the model, unless None; a temporary name first, then renamed.
        model_type: Byte-pair merges, or a unigram language model.
        seed: Seed of the sample where `texts` is larger than `max_bytes`.
        max_bytes: Most bytes to train on.
        symbols: Strings that are always one token.

    Raises:
        UserError: `vocab_size` does not fit the text, or there is no text.
    """
    sample = _sample(texts, max_bytes, seed)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sample),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            user_defined_symbols=list(symbols),
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _LINE,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,  # two threads add in another order
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_training_error(str(error), vocab_size)) from None
    tokenizer = SentencePieceTokenizer(model.getvalue(), name="the trained SentencePiece model")
    if out_path is not None:
        _write(epath.Path(out_path), model.getvalue())
    return tokenizer


_LINE = 2048
"""Longest stretch, in characters, that is given to the trainer as one sentence."""


def _lines(texts: Iterable[str]) -> Iterator[str]:
    # The trainer leaves out sentences that are long or hold a tab, so none is given to it.
    pattern = re.compile(rf"[^\t\r\n\0]{{1,{_LINE}}}")
    for text in texts:
        yield from pattern.findall(text)


def _sample(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """Returns the texts with the smallest keyed hashes that fit, in the order of their hashes."""
    heap: list[tuple[int, bytes]] = []  # by minus the hash, so that the largest leaves first
    size = 0
    key = seed.to_bytes(16, "big", signed=True)
    for text in texts:
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=16, key=key).digest()
        heapq.heappush(heap, (-int.from_bytes(digest), data))
        size += len(data)
        while size > max_bytes and len(heap) > 1:
            size -= len(heapq.heappop(heap)[1])
    return [data.decode() for _, data in sorted(heap, reverse=True)]


def _training_error(message: str, vocab_size: int) -> str:
    if limit := re.search(r"too high.*<= (\d+)", message):
        return (
            f"a SentencePiece vocabulary of {vocab_size} tokens is too large for the text given, "
            f"expected {limit[1]} or fewer; lower train_vocab_size or give more text"
        )
    if limit := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return (
            f"a SentencePiece vocabulary of {vocab_size} tokens is too small for the text given, "
            f"expected {limit[1]} or more; raise train_vocab_size"
        )
    if "sentences_.empty()" in message:
        return "no text to train a SentencePiece model on; expected at least one document"
    return (
        "SentencePiece could not be trained with these settings "
        f"({' '.join(message.split())}); change train_vocab_size or train_symbols"
    )


def _write(path: epath.Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    temporary.write_bytes(data)
    temporary.replace(path)
