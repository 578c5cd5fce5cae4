"""The small files of a model's folder: tokenizer, chat template, what ends a completion."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from jaxreason.core.errors import UserError
from jaxreason.core.text import (
    HfJson,
    Tokenizer,
    load_hf_json,
    load_sentencepiece,
)
from jaxreason.models.safetensors_io import parse_object

TRAVEL = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that are copied as they are, whichever way a model is converted."""
_LARGEST = 128 << 20


@dataclasses.dataclass(frozen=True)
class Text:
    """What a model's folder says about text; the fields are those of `Model`."""

    tokenizer: Tokenizer | None
    chat_template: str | None
    eos_ids: tuple[int, ...]
    bos_id: int | None
    files: Mapping[str, bytes]


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of `TRAVEL` that are in the folder."""
    files = {}
    for name in TRAVEL:
        path = folder / name
        if not path.is_file():
            continue
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} has {path.stat().st_size} bytes; expected a small file")
        files[name] = path.read_bytes()
    return files


def read_text(folder: Path, config: Mapping[str, Any], vocab_size: int) -> Text:
    """Reads the tokenizer and what belongs to it.

    Args:
      folder: of the model.
      config: content of its config.json.
      vocab_size: rows of the embedding; the tokenizer may not have more ids.

    Raises:
      UserError: a file is damaged, or the tokenizer is of another model.
    """
    files = read_files(folder)
    tokenizer, bos_id = _tokenizer(folder, files)
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model's embedding "
            f"{vocab_size} rows; expected the tokenizer of this model"
        )
    eos_ids = eos_of(files, config, tokenizer, str(folder))
    # Default configs name ids that a small vocabulary does not have: they never come.
    eos_ids = tuple(i for i in eos_ids if i < vocab_size)
    return Text(tokenizer, template_of(files, str(folder)), eos_ids, bos_id, files)


def eos_of(
    files: Mapping[str, bytes], config: Mapping[str, Any], tokenizer: Tokenizer | None, where: str
) -> tuple[int, ...]:
    """The ids that end a completion: those that generation_config.json names, or config.json, or
    the tokenizer's."""
    for fields in (_object(files, "generation_config.json", where), config):
        if ids := _ids(fields.get("eos_token_id")):
            return ids
    return () if tokenizer is None else (tokenizer.eos_id,)


def prompt_bos(tokenizer_json: str) -> int | None:
    """The id that a tokenizer.json's post-processor puts in front of a text, if it puts one."""
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    dressed = tokenizer.encode("a", add_special_tokens=True).ids
    if len(dressed) > len(plain) and dressed[: len(plain)] != plain:
        return dressed[0]
    return None


def _tokenizer(folder: Path, files: dict[str, bytes]) -> tuple[Tokenizer | None, int | None]:
    settings = _object(files, "tokenizer_config.json", str(folder))
    adds_bos = settings.get("add_bos_token") is True
    if "tokenizer.json" in files:
        tokenizer: Any = guarded(str(folder), lambda: load_hf_json(_settings(folder)))
        return tokenizer, guarded(str(folder), lambda: prompt_bos(files["tokenizer.json"].decode()))
    if "tokenizer.model" in files:
        tokenizer = guarded(str(folder), lambda: load_sentencepiece(folder / "tokenizer.model"))
        return tokenizer, tokenizer.bos_id if settings.get("add_bos_token", True) else None
    if "vocab.json" in files and "merges.txt" in files:
        from jaxreason.models.byte_bpe import from_files

        tokenizer = guarded(str(folder), lambda: from_files(files, settings, str(folder)))
        return tokenizer, tokenizer.bos_id if adds_bos else None
    return None, None


def _settings(folder: Path) -> HfJson:
    return HfJson(path=str(folder), parse_special=True)


def guarded(where: str, make: Callable[[], Any]) -> Any:
    """Runs the tokenizer packages on files that may hold anything; Rust's panics included."""
    try:
        return make()
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{where}: the tokenizer is damaged ({why}); get it anew") from None


def _object(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    return parse_object(files[name], f"{where}/{name}") if name in files else {}


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(i for i in values if type(i) is int and i >= 0)


def template_of(files: Mapping[str, bytes], where: str) -> str | None:
    """The chat template among a model's files, if there is one."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError:
            raise UserError(f"{where}/chat_template.jinja is not UTF-8 text") from None
    found = _object(files, "tokenizer_config.json", where).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = [entry for entry in found if isinstance(entry, dict)]
        found = next((e.get("template") for e in named if e.get("name") == "default"), None)
    return found if isinstance(found, str) else None
