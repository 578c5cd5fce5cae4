"""A tokenised corpus: flat token files, written once and memory-mapped, so they may exceed memory.

    <cache>/tokens/<key>/{split}.tokens     uint16 or uint32: every document's tokens, each document
                                            closed by one end-of-sequence token
    <cache>/tokens/<key>/{split}.offsets    int64: where documents start, and the end

The key hashes the texts (see texts.py) and the tokenizer's fingerprint.
"""

import array
import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.core.text import Tokenizer, make_tokenizer
from jaxreason.data import cache
from jaxreason.data.config import DataConfig
from jaxreason.data.sources import Document
from jaxreason.data.texts import FORMAT, SPLITS, open_texts, read_texts

_CHUNK_CHARS = 1 << 20

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """The tokens of one split of one source."""

    tokens: np.ndarray
    """uint16 or uint32 [N]: all documents, each closed by one end-of-sequence token."""
    offsets: np.ndarray
    """int64 [documents + 1]: document d is tokens[offsets[d] : offsets[d + 1]]."""
    utf8_bytes: int
    """Size of the documents' text in UTF-8; of the learned text where only a part is learned."""
    learned: np.ndarray | None = None
    """bool [N]: tokens of completions, the only targets; None: every token is learned."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One source, split and tokenised."""

    train: TokenStore
    held_out: TokenStore
    sha256: str
    """Hash of the names and texts of the train and the held-out documents, in order."""


def open_corpora(cfg: DataConfig) -> tuple[Tokenizer, list[Corpus]]:
    """Returns the tokenizer and a corpus for each source of `cfg`, built where not in the cache.

    A tokenizer that is trained is trained on the train texts of all sources. Raises UserError for a
    source without documents, or none left for training.
    """
    root = cache.cache_root(cfg.cache_dir)
    folder, meta = open_texts(cfg, root / "texts")
    hashes = meta["corpus_sha256"]
    numbers = range(len(hashes))
    tokenizer = make_tokenizer(
        cfg.tokenizer,
        train_texts=lambda: (d.text for s in numbers for d in read_texts(folder, s, "train")),
        cache_dir=root / "tokenizers",
        corpus_sha256=combined_sha256(hashes),
    )
    return tokenizer, [
        _open_tokens(folder, s, hashes[s], tokenizer, root / "tokens") for s in numbers
    ]


def combined_sha256(hashes: Sequence[str]) -> str:
    """Returns one hash for a mixture of corpora; that of a single corpus is its own."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _open_tokens(
    texts: pathlib.Path, s: int, sha256: str, tokenizer: Tokenizer, root: pathlib.Path
) -> Corpus:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    folder = root / cache.key(FORMAT, sha256, tokenizer.fingerprint)

    def write(into: pathlib.Path) -> dict[str, Any]:
        _log.info("tokenising source %d of %s into %s", s, texts, folder)
        counts = {
            split: _write_tokens(into, split, read_texts(texts, s, split), tokenizer, dtype)
            for split in SPLITS
        }
        return {
            "corpus_sha256": sha256,
            "tokenizer": tokenizer.fingerprint,
            "dtype": dtype.str,
            "counts": counts,
        }

    meta = cache.build_once(folder, write)
    stores = {}
    for split in SPLITS:
        counts = meta["counts"][split]
        tokens = np.empty(0, dtype)
        if counts["tokens"]:  # an empty file cannot be mapped
            tokens = np.asarray(np.memmap(folder / f"{split}.tokens", meta["dtype"], "r"))
        offsets = np.fromfile(folder / f"{split}.offsets", "<i8").astype(np.int64)
        stores[split] = TokenStore(tokens, offsets, counts["utf8_bytes"])
    return Corpus(**stores, sha256=meta["corpus_sha256"])


def _write_tokens(
    folder: pathlib.Path,
    split: str,
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    dtype: np.dtype,
) -> dict[str, int]:
    offsets, size = array.array("q", [0]), 0
    with (folder / f"{split}.tokens").open("wb") as file:
        for chunk in _chunks(documents):
            for document, ids in zip(chunk, tokenizer.encode_batch([d.text for d in chunk])):
                tokens = np.append(np.asarray(ids, np.int64), tokenizer.eos_id)
                if not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
                    raise UserError(
                        f"document {document.id!r} has tokens from {tokens.min()} to "
                        f"{tokens.max()}, expected 0 to {tokenizer.vocab_size - 1}; "
                        "the tokenizer's vocabulary size is wrong"
                    )
                file.write(tokens.astype(dtype).tobytes())
                offsets.append(offsets[-1] + len(tokens))
                size += len(document.text.encode())
    np.array(offsets, "<i8").tofile(folder / f"{split}.offsets")
    return {"documents": len(offsets) - 1, "tokens": offsets[-1], "utf8_bytes": size}


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    chunk, chars = [], 0
    for document in documents:
        chunk.append(document)
        chars += len(document.text)
        if chars >= _CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk
