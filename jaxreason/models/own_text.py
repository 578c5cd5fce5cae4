"""What `transformers` needs to read a tokenizer made here: files that give the same ids."""

import json
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from jaxreason.core.text import ByteTokenizer, HfTokenizer, SentencePieceTokenizer, Tokenizer
from jaxreason.models.byte_bpe import bytes_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # kinds of pieces in a model file

# Text on which the two forms of a tokenizer must agree before the second is written.
PROBE = (
    "Plain words, numbers 1234567890 and 3.14; don't stop.\n\n\tdef f(x): return x**2  # tabs\n"
    "   three spaces   , ünïcödé, 日本語, emoji \U0001f642, \x00 control, <s> </s> <unk> 12 345"
)


def files_of(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a tokenizer, by name: tokenizer.json where an equal one exists.

    A SentencePiece model also has its own `tokenizer.model`, and only that where the form that
    `tokenizers` reads would give other ids on the probe.
    """
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files: dict[str, bytes] = {}
    if isinstance(tokenizer, ByteTokenizer):
        files["tokenizer.json"] = bytes_json().encode()
        settings |= {"eos_token": "<|endoftext|>"}
    elif isinstance(tokenizer, HfTokenizer | SentencePieceTokenizer):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            files |= {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        if isinstance(tokenizer, SentencePieceTokenizer):
            text = sentencepiece_json(files["tokenizer.model"])
            settings |= {
                "eos_token": tokenizers.Tokenizer.from_str(text).id_to_token(tokenizer.eos_id)
            }
            if _agree(text, tokenizer):
                files["tokenizer.json"] = text.encode()
            else:
                settings["tokenizer_class"] = "LlamaTokenizer"
        else:
            named = {"eos_token": tokenizer.settings.eos, "bos_token": tokenizer.settings.bos}
            settings |= {key: token for key, token in named.items() if token is not None}
    files["tokenizer_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
    return files


def _agree(tokenizer_json: str, tokenizer: SentencePieceTokenizer) -> bool:
    other = tokenizers.Tokenizer.from_str(tokenizer_json)
    other.encode_special_tokens = True
    texts = [PROBE, *PROBE.splitlines(), *PROBE.split(" ")]
    return all(
        other.encode(text, add_special_tokens=False).ids == tokenizer.encode(text) for text in texts
    )


def sentencepiece_json(model: bytes) -> str:
    """A SentencePiece model that was trained here, as the text of a tokenizer.json.

    Byte-pair merges follow from the pieces: every pair whose union is a piece, in their order.
    """
    pieces, scores, kinds, unigram = _parse(model)
    ids = {piece: i for i, piece in enumerate(pieces)}
    special = {i for i, kind in enumerate(kinds) if kind in (_UNKNOWN, _CONTROL)}
    symbols = {i for i, kind in enumerate(kinds) if kind == _USER_DEFINED}
    unknown = kinds.index(_UNKNOWN)
    if unigram:
        core: dict[str, Any] = {
            "type": "Unigram", "unk_id": unknown, "byte_fallback": True,
            "vocab": [[piece, score] for piece, score in zip(pieces, scores)],
        }  # fmt: skip
    else:
        normal = {piece for piece, kind in zip(pieces, kinds) if kind == _NORMAL}
        merges = [
            (-scores[ids[piece]], cut, [piece[:cut], piece[cut:]])
            for piece in normal
            for cut in range(1, len(piece))
            if piece[:cut] in normal and piece[cut:] in normal
        ]
        core = {
            "type": "BPE", "dropout": None, "unk_token": pieces[unknown],
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": True, "ignore_merges": False, "vocab": ids,
            "merges": [pair for *_, pair in sorted(merges)],
        }  # fmt: skip
    added = [
        {
            "id": i, "content": pieces[i], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": i in special,
        }
        for i in sorted(special | symbols)
    ]  # fmt: skip
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": space, "pre_tokenizer": None, "post_processor": None,
        "decoder": {
            "type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
        },
        "model": core,
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False, indent=1)


def _parse(model: bytes) -> tuple[list[str], list[float], list[int], bool]:
    """Pieces, scores and kinds of a serialised model, and whether it is a unigram model."""
    pieces, scores, kinds, unigram = [], [], [], True
    for number, value in _fields(model):
        if number == 1 and isinstance(value, bytes):
            piece = {1: b"", 2: b"\0\0\0\0", 3: _NORMAL} | dict(_fields(value))
            pieces.append(piece[1].decode())
            scores.append(struct.unpack("<f", piece[2])[0])
            kinds.append(piece[3])
        elif number == 2 and isinstance(value, bytes):
            unigram = dict(_fields(value)).get(3, 1) == 1
    return pieces, scores, kinds, unigram


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: numbers, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}[key & 7] if key & 7 != 2 else varint()
        yield key >> 3, data[at : at + size]
        at += size
