"""Where examples of fine-tuning come from: JSON lines, or a list that is in the config."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxreason.core.errors import UserError, nearest
from jaxreason.data.pairs import Conversation, Example
from jaxreason.data.sources.paths import expand, not_utf8, open_binary

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairFiles:
    """JSON lines, each with a prompt and a completion, or with the messages of a conversation."""

    path: str = ""
    """A file, a folder (every file below it) or a glob; several separated by commas; plain, `.gz`
    or `.zst`; local or in a bucket (`gs://...`)."""
    prompt_field: str = "prompt"
    """Name of the field with the prompt."""
    completion_field: str = "completion"
    """Name of the field with the completion."""
    messages_field: str = "messages"
    """Name of the field with a list of messages, each with `role` and `content`; a line that has it
    is a conversation."""
    group_field: str = ""
    """Name of a field whose equal values keep examples on one side of the split; empty: none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples that a config file makes in Python; they are saved with the config."""

    examples: tuple[Example, ...] = ()
    """The examples, in order."""


Item = Example | Conversation


def read_pair_files(cfg: PairFiles) -> list[Item]:
    """Returns the examples of JSON-lines files, named `file:line`, in the order of the lines.

    Raises:
        UserError: a path matches nothing, a file is damaged or empty, or a line is neither a pair
            nor a conversation; the message gives file and line.
    """
    found: list[Item] = []
    for name, path in expand(cfg.path):
        before = len(found)
        with open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    found.append(_item(line, cfg, f"{name}:{number}", f"{path} line {number}"))
        if len(found) == before:
            raise UserError(
                f"{path} is empty, expected a JSON object a line with {cfg.prompt_field!r} and "
                f"{cfg.completion_field!r}, or {cfg.messages_field!r}; check data.path"
            )
    return found


def check_example(example: Example) -> Example:
    """Returns the example; UserError where there is nothing to learn from it."""
    if not example.completion:
        raise UserError(
            f"the example {example.name or example.prompt[:40]!r} has an empty completion, expected"
            " text to learn; leave the example out"
        )
    return example


def _item(line: bytes, cfg: PairFiles, name: str, where: str) -> Item:
    fields = _fields(line, where)
    group = str(_take(fields, cfg.group_field, where)) if cfg.group_field else ""
    if cfg.messages_field in fields:
        return Conversation(_messages(fields[cfg.messages_field], where), name, group)
    texts = [_take(fields, key, where) for key in (cfg.prompt_field, cfg.completion_field)]
    for key, text in zip((cfg.prompt_field, cfg.completion_field), texts, strict=True):
        if not isinstance(text, str):
            raise UserError(
                f"{where} has {type(text).__name__} in {key!r}, expected a string; mend the line"
            )
        _encodable(text, key, where)
    if not texts[1]:
        raise UserError(
            f"{where} has an empty {cfg.completion_field!r}, expected text to learn; leave the "
            "line out"
        )
    return Example(texts[0], texts[1], name, group)


def _fields(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({getattr(error, 'msg', error)}), expected one object a line; "
            "mend the line"
        ) from None
    if not isinstance(fields, dict):
        raise UserError(f"{where} is a {type(fields).__name__}, expected an object; mend the line")
    return fields


def _take(fields: dict[str, Any], key: str, where: str) -> Any:
    if key not in fields:
        raise UserError(
            f"{where} has no field {key!r} (got {str(sorted(fields))[:160]})"
            f"{nearest(key, fields)}; set the source's field, or mend the line"
        )
    return fields[key]


def _messages(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} has no list of messages, expected one or more; mend the line")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(
                f"{where}, message {i}: expected an object with 'role' and a text in 'content'; "
                "mend the line"
            )
        if message.get("role") not in ROLES:
            raise UserError(
                f"{where}, message {i}: unknown role {message.get('role')!r}, expected one of "
                f"{', '.join(ROLES)}; mend the line"
            )
        _encodable(message["content"], "content", where)
    if not any(message["role"] == "assistant" and message["content"] for message in value):
        raise UserError(
            f"{where} has no message of the role assistant with text, so nothing is learned; leave "
            "the line out"
        )
    return tuple(value)


def _encodable(text: str, key: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} has half a surrogate pair in {key!r}, which is no text; mend the line"
        ) from None
