"""Tokenizers: text to ids and back, one protocol, named by what defines the ids."""

from collections.abc import Callable, Iterable

from etils import epath

from jaxreason.core.errors import UserError
from jaxreason.core.text.behind import encode_behind
from jaxreason.core.text.hf_tok import HfJson, HfTokenizer, load_hf_json
from jaxreason.core.text.sentencepiece_tok import (
    SentencePiece,
    SentencePieceTokenizer,
    load_sentencepiece,
    train_sentencepiece,
)
from jaxreason.core.text.tokenizer import Bytes, ByteTokenizer, Tokenizer, sha256_of

__all__ = [
    "ByteTokenizer",
    "Bytes",
    "HfJson",
    "HfTokenizer",
    "SentencePiece",
    "SentencePieceTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "encode_behind",
    "load_hf_json",
    "load_sentencepiece",
    "make_tokenizer",
    "train_sentencepiece",
]

TokenizerConfig = Bytes | SentencePiece | HfJson


def make_tokenizer(
    cfg: TokenizerConfig,
    *,
    train_texts: Callable[[], Iterable[str]],
    cache_dir: epath.PathLike,
    corpus_sha256: str,
) -> Tokenizer:
    """Returns the tokenizer that `cfg` names, training and caching it where it has no file.

    Args:
        cfg: Which tokenizer.
        train_texts: Returns the documents to train on; called only where one is trained that is
            not in the cache. Held-out text must not be among them.
        cache_dir: Folder for trained models, local or in a bucket; made where absent.
        corpus_sha256: Identifies what `train_texts` yields, the split included.

    Raises:
        UserError: a file is absent or damaged, or the settings do not fit the text.
    """
    match cfg:
        case Bytes():
            return ByteTokenizer()
        case HfJson():
            return load_hf_json(cfg)
        case SentencePiece(model=""):
            return _trained(cfg, train_texts, epath.Path(cache_dir), corpus_sha256)
        case SentencePiece():
            return load_sentencepiece(cfg.model)
    raise UserError(
        f"unknown tokenizer {type(cfg).__name__}, expected Bytes, SentencePiece or HfJson"
    )


def _trained(
    cfg: SentencePiece,
    train_texts: Callable[[], Iterable[str]],
    cache_dir: epath.Path,
    corpus_sha256: str,
) -> SentencePieceTokenizer:
    path = cache_dir / f"sentencepiece-{sha256_of(corpus_sha256, repr(cfg))[:24]}.model"
    if path.exists():
        return load_sentencepiece(path)
    return train_sentencepiece(
        train_texts(),
        cfg.train_vocab_size,
        path,
        model_type=cfg.train_model_type,
        seed=cfg.train_seed,
        max_bytes=cfg.train_bytes,
        symbols=cfg.train_symbols,
    )
