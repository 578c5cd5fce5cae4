"""The text of `--help`: every field of a config with its type, value and docstring."""

import json
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, is_dataclass
from typing import Any

from jaxreason.config_types import members, reachable, to_plain, type_name, walk


def describe(cfg_or_type, width: int | None = None) -> str:
    """Every field of a config (with its value) or of a config class (with its default).

    An entry holds the dotted path, type, value and the docstring below the field in the source.
    Then come the fields of the classes that a union or a tuple could hold and does not.
    """
    width = width or max(40, min(shutil.get_terminal_size().columns, 100))
    root = cfg_or_type if isinstance(cfg_or_type, type) else type(cfg_or_type)
    lines, seen = [], set()
    others = [(f"Where {at} is {cls.__name__}:", cls, at) for cls, at in reachable([root]).items()]
    for title, node, at in [("", cfg_or_type, "config"), *others]:
        if title and (node in seen or node is root):
            continue
        lines += ["", _fill(title, width)] if title else []
        seen.add(node if title else root)
        for path, tp, value, doc in walk(node, at):
            for item in value if isinstance(value, tuple) else (value,):
                seen.add(item if isinstance(item, type) else type(item))
            head = f"--{path}  {type_name(tp)}{_value(value, tp)}"
            lines += [_fill(head, width, "", " " * 8), *_doc(doc, width)]
    return "\n".join(lines) + "\n"


def _value(value, tp) -> str:
    if value is MISSING:
        return "  (required)"
    if is_dataclass(value):
        one = value if isinstance(value, type) else type(value)
        return f" = {one.__name__}" if len(members(tp)) > 1 else ""
    if isinstance(value, tuple) and any(map(is_dataclass, value)):
        return f" = [{', '.join(type(item).__name__ for item in value)}]"
    if isinstance(value, tuple | dict | bool):
        return f" = {json.dumps(to_plain(value, tp), ensure_ascii=False)}"
    return f" = {value!r}"


def _fill(text: str, width: int, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _doc(doc: str, width: int) -> list[str]:
    return [_fill(doc, width, " " * 4, " " * 4)] if doc else []


def page(
    prog: str, flags: Mapping[str, tuple[Any, str]], recipes: Mapping[str, type], described
) -> str:
    """The whole help page; `described` is a config, a config class or None."""
    width = max(40, min(shutil.get_terminal_size().columns, 100))
    lines = [f"usage: {prog} --config=FILE [--config.FIELD=VALUE ...] [FLAGS]", ""]
    entries = [
        ("--config=FILE.py[:ARG]", 'a Python file with get_config(arg="")'),
        ("--config=RUN/config.json", "the saved config of a run"),
        ("--config.FIELD=VALUE", "changes a field; applied in the order given"),
        *((f"--{name}={type_name(kind).upper()}", doc) for name, (kind, doc) in flags.items()),
        ("--help", "this text; with --config, the values of that config"),
    ]
    for name, doc in entries:
        lines.append(name)
        lines += _doc(doc, width)
    if described is None:
        names = ", ".join(f"{name} ({cls.__name__})" for name, cls in recipes.items())
        text = f"Recipes: {names}. With --config, the fields of that config are listed."
        return "\n".join([*lines, "", _fill(text, width), ""])
    cls = described if isinstance(described, type) else type(described)
    return "\n".join([*lines, "", f"Fields of {cls.__name__}:", "", describe(described, width)])
