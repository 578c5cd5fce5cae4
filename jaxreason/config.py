"""Configs: a Python file or saved JSON, typed overrides, a dump that replays, help, differences.

    --config=FILE.py[:ARG]        a Python file with `get_config(arg="")`
    --config=RUN/config.json      what `save` wrote
    --config.train.steps=200      then overrides, applied in the order given
    --config.objective=Let        a field that is a union of classes: the class with its defaults
    --config.phases.0.until=100   an element of a tuple; likewise an entry of a dict

A mistake ends in one line, before any device is touched: nothing here imports JAX.
"""

import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import operator
import re
import sys
import traceback
import types
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from etils import epath

from jaxreason.config_help import describe as describe
from jaxreason.config_help import page
from jaxreason.config_types import (
    Mismatch,
    classes,
    construct,
    element_type,
    fields,
    fit,
    one_line,
    parse_json,
    reachable,
    read,
    show,
    to_plain,
    walk,
)
from jaxreason.core.errors import UserError, nearest

ABSENT = "(absent)"  # what `diff` gives for an element or a key that one side does not have
_EXAMPLES = (
    "--config=experiments/PAPER/RUN.py --config.train.steps=200",
    "--config=runs/NAME/config.json",
)


class Usage(UserError):
    """The answer to an empty command line: several lines, to be printed without `error: `."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A parsed command line."""

    config: Any
    """The checked config; None where help was asked for without a config."""
    recipe: str | None
    """The name of the recipe whose root class the config has."""
    flags: dict[str, Any]
    """Values of the extra flags; None where not given."""
    help: str | None
    """Text to print instead of running."""


def parse(
    argv: Sequence[str],
    *,
    recipes: Mapping[str, type],
    default: str | None = None,
    flags: Mapping[str, tuple[Any, str]] = types.MappingProxyType({}),
    prog: str = "python -m jaxreason.main",
    examples: Sequence[str] = _EXAMPLES,
) -> Command:
    """Reads a command line into a checked config.

    recipes: name -> root dataclass; `default` names the one that a bare `--help` describes.
    flags: extra flags, name without dashes -> (type, what it does); a bool needs no value.
    Raises UserError (one line), or Usage (several) for an empty command line.
    """
    if not argv:
        lines = [f"  {prog} {example}" for example in examples]
        hint = f"`{prog} --help` lists every field."
        raise Usage("\n".join([f"usage: {prog} --config=FILE ...", "", *lines, "", hint]))
    source, overrides, values, wants_help = None, [], dict.fromkeys(flags), False
    for arg, after in itertools.zip_longest(argv, argv[1:], fillvalue="-"):
        name, equals, text = arg.partition("=")
        extra = flags.get(name[2:]) if name.startswith("--") else None
        if arg in ("--help", "-h"):
            wants_help = True
        elif not (extra or name == "--config" or name.startswith("--config.")):
            known = ["--config", *(f"--{flag}" for flag in flags), "--help"]
            hint = nearest(name, known) or f"; expected {', '.join(known)}, as --name=value"
            raise UserError(f"unknown argument {show(arg)}{hint}")
        elif not equals and not (extra and extra[0] is bool):
            value = "VALUE" if after.startswith("-") else after
            raise UserError(f"{show(arg)} has no value; write {show(f'{arg}={value}')}")
        elif name.startswith("--config."):
            overrides.append((name.split(".")[1:], text))
        elif (values[name[2:]] if extra else source) is not None:
            raise UserError(f"{name} is given twice; give it once")
        elif extra:
            values[name[2:]] = read(text if equals else "true", extra[0], name)
        else:
            source = text
    if source is None and (overrides or not wants_help):
        raise UserError("no config given; write --config=FILE.py or --config=RUN/config.json")
    config, described = None, recipes[default] if default else None
    if source is not None:
        config = _load_file(source, tuple(recipes.values()))
        for parts, text in overrides:
            config = _override(config, type(config), parts, text, "config", config)
        config = described = check(config)
    return Command(
        config=config,
        recipe=next((name for name, cls in recipes.items() if cls is type(config)), None),
        flags=values,
        help=page(prog, flags, recipes, described) if wants_help else None,
    )


def check(cfg):
    """Returns the config with every value fitted to its declared type, then validated.

    `validate()` of each dataclass that has one is called, children first. Raises UserError.
    """
    cfg = fit(cfg, type(cfg), "config")
    _validate(cfg, "config")
    return cfg


def _validate(node, path: str) -> None:
    below = {}
    if is_dataclass(node):
        below = {name: getattr(node, name) for name in fields(type(node))}
    elif isinstance(node, tuple | dict):
        below = node if isinstance(node, dict) else dict(enumerate(node))
    for name, item in below.items():
        _validate(item, f"{path}.{name}")
    if is_dataclass(node) and hasattr(node, "validate"):
        try:
            node.validate()  # type: ignore
        except (UserError, ValueError) as error:
            raise UserError(one_line(f"{path}: {error}")) from error


# Files.


def dump(cfg) -> str:
    """The config as indented JSON, from which `load` rebuilds an equal one."""
    cfg = fit(cfg, type(cfg), "config")
    return json.dumps(to_plain(cfg, object), indent=2) + "\n"


def load(text: str, roots: Iterable[type], *, where: str = "config") -> Any:
    """Rebuilds and checks what `dump` wrote; only classes reachable from `roots` can be made."""
    return check(_from_json(text, tuple(roots), where))


def save(cfg, path) -> None:
    """Writes `dump(cfg)` to a local or bucket path; the file is there whole or not at all."""
    text, path = dump(cfg), epath.Path(path)
    part = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text)
        part.replace(path)
    except Exception as error:  # a bucket's library raises what it likes
        with contextlib.suppress(Exception):
            part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(one_line(f"cannot write {path}: {reason}")) from error


def _load_file(source: str, roots: tuple[type, ...]):
    python = re.fullmatch(r"(.+?\.py)(?::(.*))?", source, re.DOTALL)
    path = python[1] if python else source
    where = one_line(path)
    try:
        if path and not python and epath.Path(path).is_dir():
            saved = epath.Path(path) / "config.json"
            hint = f"; did you mean {saved}?" if saved.exists() else ""
            raise UserError(one_line(f"--config={where} is a directory; expected a file{hint}"))
        if not python and not path.endswith(".json"):
            raise UserError(f"--config={where}: expected FILE.py, FILE.py:ARG or a saved FILE.json")
        data = epath.Path(path).read_bytes()
    except FileNotFoundError as error:
        names = []
        with contextlib.suppress(Exception):
            names = [p.name for p in epath.Path(path).parent.iterdir()]
        hint = nearest(epath.Path(path).name, names)
        raise UserError(f"--config={where}: there is no such file{hint}") from error
    except UserError:
        raise
    except Exception as error:  # a bucket's library raises what it likes
        reason = getattr(error, "strerror", None) or error
        raise UserError(one_line(f"--config={where}: cannot be read: {reason}")) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise UserError(f"{where}: not UTF-8 text ({bad})") from error
    if not python:
        return _from_json(text, roots, where)
    return _from_python(text, path, where, python[2] or "", roots)


def _from_json(text: str, roots: tuple[type, ...], where: str):
    value = parse_json(text, where)
    if not isinstance(value, dict) or "_type" not in value:
        names = " or ".join(cls.__name__ for cls in roots)
        raise UserError(one_line(f"{where}: expected an object with _type {names} and its fields"))
    root = functools.reduce(operator.or_, roots)
    try:
        return fit(value, root, "config", plain=True)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _from_python(text: str, path: str, where: str, arg: str, roots: tuple[type, ...]):
    module = types.ModuleType("_jaxreason_config_file")
    module.__file__ = path
    # Dataclasses defined in the file look their module up while it runs.
    sys.modules[module.__name__] = module
    try:
        exec(compile(text, path, "exec"), module.__dict__)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError('no get_config(arg="") in this file')
        cfg = get_config(arg) if arg else get_config()
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        message = str(error)
        if isinstance(error, SyntaxError) and error.filename == path:
            lines, message = [error.lineno], error.msg
        place = f"{where}:{lines[-1]}" if lines else where
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        hint = _keyword_hint(message, roots)
        raise UserError(one_line(f"{place}: {kind}{message}{hint}")) from error
    finally:
        sys.modules.pop(module.__name__, None)
    if type(cfg) not in roots:
        names = " or ".join(cls.__name__ for cls in roots)
        got = f"{show(cfg)} ({type(cfg).__name__})"
        raise UserError(one_line(f"{where}: get_config returned {got}, expected a {names}"))
    try:
        return fit(cfg, type(cfg), "config")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _keyword_hint(message: str, roots: tuple[type, ...]) -> str:
    """For `Optim(lrr=1)`, whose TypeError names no near field before Python 3.13."""
    found = re.fullmatch(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    named = [cls for cls in reachable(roots) if found and cls.__name__ == found[1]]
    return nearest(found[2], fields(named[0])) if found and named else ""


# Overrides.


def _override(node, tp, parts: list[str], text: str, path: str, root):
    """A copy of `node` with the field at `parts` read from `text`; `tp` is what may stand here."""
    if not parts:
        return read(text, tp, path)
    name, rest = parts[0], parts[1:]
    here = f"{path}.{name}"
    if is_dataclass(node):
        known = fields(type(node))
        if name not in known:
            raise _unknown(name, node, path, root)
        given = {key: getattr(node, key) for key in known}
        given[name] = _override(given[name], known[name][0], rest, text, here, root)
        return construct(type(node), given, path)  # type: ignore
    if isinstance(node, tuple):
        if name not in map(str, range(len(node))):
            hint = f"0 to {len(node) - 1}" if node else "none, for it is empty"
            raise Mismatch(path, f"got the index {show(name)}, expected {hint}")
        i = int(name)
        new = _override(node[i], element_type(tp, tuple, i), rest, text, here, root)
        return (*node[:i], new, *node[i + 1 :])
    if isinstance(node, dict):
        key = ".".join(parts)
        return node | {key: read(text, element_type(tp, dict), f"{path}.{key}")}
    hint = f"; first choose it: --{path}={' or '.join(classes(tp))}" if classes(tp) else ""
    raise Mismatch(path, f"is {show(node)}, which has no field {show(name)}{hint}")


def _unknown(name: str, node, path: str, root) -> Mismatch:
    """The error for a field that is not there: the same name elsewhere, else the nearest."""
    places = [place for place, *_ in walk(root, "config")]
    likely = [place for place in places if place.endswith(f".{name}")][:3]
    if not likely:
        by_name = {place.rpartition(".")[2]: place for place in reversed(places)}
        by_name |= {own: f"{path}.{own}" for own in fields(type(node))}
        likely = [by_name[near] for near in difflib.get_close_matches(name, by_name, 1, 0.5)]
    hint = f"; did you mean {' or '.join(map(repr, likely))}?"
    if not likely:
        hint = f"; its fields are {', '.join(fields(type(node)))}"
    return Mismatch(path, f"{type(node).__name__} has no field {show(name)}{hint}")


def diff(a, b, path: str = "config") -> list[tuple[str, Any, Any]]:
    """The places where two configs differ, as (dotted path, value in a, value in b).

    Two classes in one place are one difference; what one side lacks is `ABSENT`.
    """
    if type(a) is type(b) and is_dataclass(a):
        parts = [(name, getattr(a, name), getattr(b, name)) for name in fields(type(a))]
    elif isinstance(a, dict) and isinstance(b, dict):
        parts = [(key, a.get(key, ABSENT), b.get(key, ABSENT)) for key in a | b]
    elif isinstance(a, tuple) and isinstance(b, tuple) and any(map(is_dataclass, a + b)):
        pairs = enumerate(itertools.zip_longest(a, b, fillvalue=ABSENT))
        parts = [(i, left, right) for i, (left, right) in pairs]
    else:
        return [] if type(a) is type(b) and a == b else [(path, a, b)]
    return [found for name, x, y in parts for found in diff(x, y, f"{path}.{name}")]
