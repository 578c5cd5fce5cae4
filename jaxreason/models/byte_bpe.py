"""Byte-level BPE tokenizers as the text of a tokenizer.json, from a vocabulary and merges.

GGUF files and old Hugging Face folders hold the vocabulary and the merges alone; how text is cut
before merging is known by name. The same form writes our byte tokenizer exactly: 256 tokens, no
merges.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxreason.core.errors import UserError, nearest
from jaxreason.core.text import HfTokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _level(regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": regex,
    }


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}{_REST}"
    split = {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False
    }  # fmt: skip
    return [split, _level(False)]


# Names as in llama.cpp; the rules are those of the models' own tokenizer.json.
CUTS: dict[str, dict[str, Any]] = {
    "gpt-2": {"pre": [_level(True)]},
    "smollm": {"pre": [{"type": "Digits", "individual_digits": True}, _level(True)]},
    "llama-bpe": {"pre": _split(r"\p{N}{1,3}"), "ignore_merges": True, "bos": True},
    "qwen2": {"pre": _split(r"\p{N}"), "normalizer": {"type": "NFC"}},
}
CUTS["llama3"] = CUTS["llama-v3"] = CUTS["llama-bpe"]


def tokenizer_json(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    cut: str,
    added: Mapping[int, tuple[str, bool]],
    bos: str | None = None,
    where: str = "the tokenizer",
) -> str:
    """Returns the text of a tokenizer.json.

    Args:
      vocab: tokens, in GPT-2's spelling of bytes, and their ids.
      merges: pairs of tokens, the earliest first.
      cut: how text is cut into words; a name of `CUTS`.
      added: id -> (token, whether it is special) of tokens that are found before any cutting.
      bos: token put in front of a text, or None.
      where: what errors call the source.

    Raises:
      UserError: `cut` is not known.
    """
    if cut not in CUTS:
        raise UserError(
            f"{where}: the pre-tokenizer is {cut[:40]!r}; supported are {', '.join(CUTS)}"
            f"{nearest(cut[:40], CUTS)}"
        )
    rule = CUTS[cut]
    post: dict[str, Any] = _level(True) | {"trim_offsets": False}
    if bos is not None:
        front = {"SpecialToken": {"id": bos, "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
        post = {
            "type": "TemplateProcessing",
            "single": [front, a],
            "pair": [front, a, b],
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
        }
    pre = rule["pre"]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i, "content": token, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": special,
            }
            for i, (token, special) in sorted(added.items())
        ],
        "normalizer": rule.get("normalizer"),
        "pre_tokenizer": pre[0] if len(pre) == 1 else {"type": "Sequence", "pretokenizers": pre},
        "post_processor": post,
        "decoder": _level(True),
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": rule.get("ignore_merges", False),
            "vocab": dict(vocab), "merges": [list(pair) for pair in merges],
        },
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False, indent=1)


def parse_merges(lines: Sequence[str], where: str) -> list[tuple[str, str]]:
    """The pairs of a merges list, each `left right`; UserError for anything else."""
    pairs = []
    for line in lines:
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise UserError(f"{where}: the merge {line[:60]!r} is no pair of tokens; get it anew")
        pairs.append((left, right))
    return pairs


def from_files(files: Mapping[str, bytes], settings: Mapping[str, Any], where: str) -> HfTokenizer:
    """The tokenizer of vocab.json and merges.txt (GPT-2's format, as OPT has it).

    Raises:
      UserError: they do not parse, or nothing names the end of a document.
    """
    vocab = json.loads(files["vocab.json"].decode())
    if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise UserError(f"{where}/vocab.json is no map from tokens to ids; get it anew")
    lines = files["merges.txt"].decode().splitlines()
    merges = parse_merges([x for x in lines if x and not x.startswith("#version")], where)
    named = dict(json.loads(files.get("special_tokens_map.json", b"{}").decode())) | dict(settings)
    special = {}
    for key in ("bos", "eos", "unk", "pad"):
        token = named.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocab:
            special[key] = token
    if "eos" not in special:
        raise UserError(f"{where}: no file names the end-of-text token of vocab.json")
    text = tokenizer_json(
        vocab,
        merges,
        cut="gpt-2",
        added={vocab[token]: (token, True) for token in special.values()},
        bos=special.get("bos") if settings.get("add_bos_token") is True else None,
        where=where,
    )
    return HfTokenizer(
        text, eos=special["eos"], bos=special.get("bos"), parse_special=True, name=where
    )


def byte_characters() -> list[str]:
    """GPT-2's spelling of each byte: itself where it prints, a letter above 255 otherwise."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def bytes_json(eos: str = "<|endoftext|>") -> str:
    """The tokenizer.json whose ids are those of `ByteTokenizer`: byte b is b, the end is 256."""
    vocab = {character: byte for byte, character in enumerate(byte_characters())} | {eos: 256}
    text = tokenizer_json(vocab, [], cut="gpt-2", added={256: (eos, True)})
    content = json.loads(text)
    content["pre_tokenizer"] = _level(False)
    return json.dumps(content, ensure_ascii=False, indent=1)
