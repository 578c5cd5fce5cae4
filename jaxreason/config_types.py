"""What a config's declared types are, and whether a value (Python, JSON or flag text) fits them.

A config is a tree of frozen dataclasses whose fields are int, float, bool, str, Literal, X | None,
dataclasses, unions of dataclasses, tuples of these, and dicts from str. Dataclasses do not check
types, so every value passes through `fit`, which is strict: 1 is a float, 1.0 is an int, and
nothing else changes its type.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, is_dataclass
from typing import Any, Literal, get_args, get_origin

from jaxreason.core.errors import UserError, nearest


class Mismatch(UserError):
    """A value that does not fit the field at `path`."""

    def __init__(self, path: str, message: str):
        super().__init__(one_line(f"{path}: {message}"))
        self.path = path


def one_line(message: str) -> str:
    """The message without line breaks."""
    return " ".join(message.split())


def show(value) -> str:
    """A value's repr, shortened for a message."""
    try:
        text = repr(value)
    except Exception:  # too deep, too many digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-10:]}"


@functools.cache
def fields(cls) -> dict[str, tuple[Any, dataclasses.Field, str]]:
    """Name -> (resolved type, field, attribute docstring), in the order of declaration."""
    hints, docs = typing.get_type_hints(cls), {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):  # a builtin, or made without a source file
            continue
        for node, after in itertools.pairwise(getattr(tree, "body", ())):
            match node, after:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(doc))):
                    docs[name] = one_line(doc)
    used = [field for field in dataclasses.fields(cls) if field.init]
    return {field.name: (hints[field.name], field, docs.get(field.name, "")) for field in used}


def members(tp) -> tuple[Any, ...]:
    """The alternatives of a type, aliases resolved; the type alone where it is no union."""
    if isinstance(tp, typing.TypeAliasType):
        return members(tp.__value__)
    if get_origin(tp) in (typing.Union, types.UnionType):
        return tuple(member for arg in get_args(tp) for member in members(arg))
    return (tp,)


def classes(tp) -> dict[str, type]:
    """The dataclasses among the alternatives of a type, by name."""
    found = [member for member in members(tp) if isinstance(member, type) and is_dataclass(member)]
    by_name = {member.__name__: member for member in found}
    if len(by_name) < len(found):
        raise TypeError(
            f"two classes of one name in {type_name(tp)}; saved configs tell them by name"
        )
    return by_name


def element_type(tp, container: type, index: int = 0) -> Any:
    """The type of an element of the tuple, or of a value of the dict, that `tp` allows."""
    args = next(get_args(member) for member in members(tp) if get_origin(member) is container)
    return args[1] if container is dict else args[0] if args[-1] is ... else args[index]


def reachable(roots: Iterable[Any]) -> dict[type, str]:
    """Every dataclass that configs of these types can hold -> the first path where it may stand."""
    found, queue = {}, [(root, "config") for root in roots]
    for tp, path in queue:  # grows while it is walked
        for member in members(tp):
            if get_origin(member) in (tuple, dict):
                queue += [(arg, f"{path}.N") for arg in get_args(member)]
            elif is_dataclass(member) and member not in found:
                found[member] = path
                queue += [(f[0], f"{path}.{name}") for name, f in fields(member).items()]
    return found


def walk(node, path: str) -> Iterator[tuple[str, Any, Any, str]]:
    """Yields (path, type, value, docstring) of every field below a config or a config class.

    Below a class the values are the defaults; a class stands for a config that has no default.
    """
    for name, (tp, field, doc) in fields(node if isinstance(node, type) else type(node)).items():
        if not isinstance(node, type):
            value = getattr(node, name)
        else:
            factory = field.default_factory
            value = field.default if factory is MISSING else factory()
            if value is MISSING and len(members(tp)) == len(classes(tp)) == 1:
                value = members(tp)[0]
        here = f"{path}.{name}"
        yield here, tp, value, doc
        several = enumerate(value) if type(value) is tuple else ()
        below = {f"{here}.{i}": item for i, item in several} or {here: value}
        for key, item in below.items():
            if is_dataclass(item):
                yield from walk(item, key)


def type_name(tp) -> str:
    """A type as one writes it in a config class; the choices for a Literal."""
    if len(members(tp)) > 1:
        return " | ".join(map(type_name, members(tp)))
    (tp,) = members(tp)
    origin, args = get_origin(tp), get_args(tp)
    if origin is Literal:
        return " | ".join(map(repr, args))
    if origin:
        return f"{origin.__name__}[{', '.join('...' if a is ... else type_name(a) for a in args)}]"
    return "None" if tp is types.NoneType else getattr(tp, "__name__", repr(tp))


def wrong(value, tp, path: str) -> Mismatch:
    """The error for a value that is not a `tp`."""
    choices = [*classes(tp), *itertools.chain(*map(get_args, members(tp)))]
    hint = nearest(value, [c for c in choices if type(c) is str]) if type(value) is str else ""
    if bool in members(tp) and type(value) is str:
        hint = " (true or false)"
    kind = "" if isinstance(value, str | int | float | None) else f" ({type(value).__name__})"
    return Mismatch(path, f"got {show(value)}{kind}, expected {type_name(tp)}{hint}")


def construct(cls: type, given: dict[str, Any], path: str):
    """`cls(**given)`; UserError for unknown or missing fields and for what its init raises."""
    for name in given:
        if name not in fields(cls):
            hint = nearest(name, fields(cls)) or f"; its fields are {', '.join(fields(cls))}"
            raise Mismatch(f"{path}.{name}", f"{cls.__name__} has no field {show(name)}{hint}")
    for name, (tp, field, _) in fields(cls).items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            message = f"missing; {cls.__name__} needs it ({type_name(tp)}); give the fields as JSON"
            raise Mismatch(f"{path}.{name}", message)
    try:
        return cls(**given)
    except (UserError, ValueError, TypeError) as error:
        raise UserError(one_line(f"{path}: {error}")) from error


def fit(value, tp, path: str, plain: bool = False):
    """Returns `value` as a `tp`, or raises Mismatch with the path of the innermost culprit.

    plain: the value comes from JSON, with objects for dataclasses (`_type` names the class where
    there is a choice) and lists for tuples; without it, such stand-ins are refused.
    """
    options, known, error = members(tp), classes(tp), None
    if plain and isinstance(value, dict) and known and ("_type" in value or len(known) > 1):
        tag = value.get("_type")
        if not isinstance(tag, str) or tag not in known:
            got = f"_type {show(tag)}" if "_type" in value else "an object without _type"
            hint = nearest(tag, known) if isinstance(tag, str) else ""
            raise Mismatch(path, f"got {got}, expected _type {' or '.join(known)}{hint}")
        options = (known[tag],)
    for option in sorted(options, key=lambda option: option is not type(value)):
        try:
            return _fit_one(value, option, path, plain)
        except Mismatch as mismatch:
            # What failed further down says more than that nothing fitted.
            error = error or (mismatch if mismatch.path != path else None)
    raise error or wrong(value, tp, path)


def _fit_one(value, tp, path: str, plain: bool):
    origin, args = get_origin(tp), get_args(tp)
    if plain and tp is float and value in ("inf", "-inf"):  # JSON has no infinity
        value = float(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_dataclass(tp):
        if plain and isinstance(value, dict):
            given = {name: item for name, item in value.items() if name != "_type"}
        elif type(value) is tp:
            given = {name: getattr(value, name) for name in fields(tp)}
        else:
            raise wrong(value, tp, path)
        kinds = {name: fields(tp)[name][0] for name in given if name in fields(tp)}
        fitted = {name: fit(given[name], kinds[name], f"{path}.{name}", plain) for name in kinds}
        return construct(tp, given | fitted, path)  # which refuses the unknown ones
    if origin is tuple and isinstance(value, (tuple, list) if plain else tuple):
        if args[-1] is ... or len(args) == len(value):
            kinds = [args[0]] * len(value) if args[-1] is ... else args
            pairs = enumerate(zip(value, kinds))
            return tuple(fit(item, kind, f"{path}.{i}", plain) for i, (item, kind) in pairs)
    elif origin is dict and isinstance(value, dict):
        pairs = [(fit(key, str, f"{path} (a key)"), item) for key, item in value.items()]
        return {key: fit(item, args[1], f"{path}.{key}", plain) for key, item in pairs}
    elif origin is Literal:
        for choice in args:
            if type(value) is type(choice) and value == choice:
                return choice
    elif number and tp in (int, float):
        # int(inf) and float(10**400) raise; nan equals nothing.
        with contextlib.suppress(OverflowError, ValueError):
            if tp(value) == value:
                return tp(value)
    elif tp in (bool, types.NoneType) and type(value) is tp:
        return value
    elif tp is str and isinstance(value, str):
        if value.encode("utf-8", "ignore").decode() != value:  # a lone surrogate
            raise UserError(one_line(f"{path}: got {show(value)}, expected valid UTF-8"))
        return str(value)
    elif origin not in (tuple, dict) and tp not in (int, float, bool, str, types.NoneType):
        raise TypeError(f"{path}: a config field cannot be of type {type_name(tp)}")
    raise wrong(value, tp, path)


def to_plain(value, tp):
    """What `fit(..., plain=True)` turns back into `value`; `tp` is what its place may hold."""
    if is_dataclass(value):
        # A place that can hold one class alone needs no tag; the root, whose tp is object, does.
        alone = set(members(tp)) <= {type(value), types.NoneType}
        tag = {} if alone else {"_type": type(value).__name__}
        return tag | {k: to_plain(getattr(value, k), f[0]) for k, f in fields(type(value)).items()}
    if isinstance(value, tuple):
        return [to_plain(item, element_type(tp, tuple, i)) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: to_plain(item, element_type(tp, dict)) for key, item in value.items()}
    return str(value) if value in (float("inf"), float("-inf")) else value


def read(text: str, tp, path: str):
    """Returns the text of a flag as a `tp`, or raises UserError.

    A dataclass is given by its class name (its defaults) and a tuple as `1,2`; these and dicts
    may also be JSON. `None` is None where the type allows it, and a str takes any other text.
    """
    options = members(tp)
    if text[:1] in ("[", "{") and (classes(tp) or {tuple, dict} & {*map(get_origin, options)}):
        return fit(parse_json(text, path), tp, path, plain=True)
    for option in sorted(options, key=lambda option: option is str):
        if option is types.NoneType and text == "None":
            return None
        if is_dataclass(option) and text == option.__name__:
            return construct(option, {}, path)
        if get_origin(option) is Literal and text in map(str, get_args(option)):
            return next(choice for choice in get_args(option) if str(choice) == text)
        if option is bool and text in ("true", "false", "True", "False"):
            return text in ("true", "True")
        if option in (int, float):
            with contextlib.suppress(ValueError, Mismatch):
                return fit(_number(text), option, path)
        if option is str:
            return fit(text, str, path)
    container = next((option for option in options if get_origin(option) is tuple), None)
    # Among other options, a tuple is recognised by its comma.
    if container and ("," in text or not {*options} - {container, types.NoneType}):
        parts = text.removeprefix("(").removesuffix(")").removesuffix(",").split(",")
        parts = [part.strip() for part in parts] if parts != [""] else []
        args = get_args(container)
        if args[-1] is ... or len(args) == len(parts):
            kinds = [args[0]] * len(parts) if args[-1] is ... else args
            pairs = enumerate(zip(parts, kinds))
            return tuple(read(part, kind, f"{path}.{i}") for i, (part, kind) in pairs)
    raise wrong(text, tp, path)


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def parse_json(text: str, where: str):
    """`json.loads`, with a UserError that says where the text is malformed or repeats a key."""

    def no_repeats(pairs):
        if len(dict(pairs)) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"key {show(repeated)} appears twice in one object")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=no_repeats)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise UserError(one_line(f"{where}: malformed JSON, {place}: {error.msg}")) from error
    except (ValueError, RecursionError) as error:  # also: a number of thousands of digits
        raise UserError(one_line(f"{where}: malformed JSON: {error}")) from error
