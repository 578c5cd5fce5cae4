"""Functions of Python's standard library, to be summed up in the first line of their docstring.

Every machine with the same Python has the same examples. The `group` of an example is the top-level
package it is from, so that a split by group tests on modules that training never saw: `_pydecimal`
counts as `decimal` and so on, and of near-duplicates (copied modules) only the first is kept.
"""

import ast
import dataclasses
import functools
import re
import warnings
from collections.abc import Iterable, Iterator

from jaxreason.core.errors import UserError
from jaxreason.data.clusters import Sketches
from jaxreason.data.pairs import Example
from jaxreason.data.sources import Document
from jaxreason.data.sources.stdlib import Stdlib, iter_stdlib
from jaxreason.data.tasks.parts import Part, belongs, check_fraction

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Words that tell nothing beyond a function's name.
_FILLERS = frozenset("a an the this that of for to from in on and is are it its self".split())
_VERBS: dict[str, str] = {
    "returns": "return",
    "gets": "get",
    "sets": "set",
    "makes": "make",
    "creates": "create",
}
_MARKUP = re.compile(r"->|>>>|::=|[-=*]{3}|Do not override")
_GENERATED = re.compile(r"(generated (by|from)|automatically generated|do not edit)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Docstrings:
    """Standard library functions without their docstring, and its first line (reconstructed)."""

    instruction: str = "Say in one sentence, in plain words, what this Python function does."
    """Stands before the source in every prompt."""
    max_prompt_chars: int = 1200
    """Longest prompt in characters; functions whose prompt is longer are left out."""
    min_source_lines: int = 3
    """Fewest lines of source, docstring, blank and comment lines not counted."""
    min_words: int = 4
    """Fewest words of a first line."""
    max_words: int = 20
    """Most words of a first line."""
    leave_out: tuple[str, ...] = (
        "distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo", "venv",
    )  # fmt: skip
    """Top-level packages that are not read: those that some systems install apart, so that one
    Python version has one set of examples."""
    near_duplicate_threshold: float = 0.7
    """Similarity, 0.5 to 1, from which two sources are near duplicates; 1 compares whole texts."""
    part: Part = "all"
    """`train` or `test` leaves the other out: packages, told apart by a hash of their name. A run
    splits what it is given again, into text to train on and text to evaluate on while it trains."""
    test_fraction: float = 0.15
    """About which share of the packages is in `test`."""

    @property
    def examples(self) -> tuple[Example, ...]:
        """The examples, in order."""
        return examples(self)


def check(cfg: Docstrings) -> None:
    """Raises UserError where a field of `cfg` allows no examples."""
    check_fraction(cfg.test_fraction, "Docstrings")
    wrong = None
    if cfg.max_prompt_chars <= len(cfg.instruction):
        wrong = f"max_prompt_chars={cfg.max_prompt_chars}, expected more than the instruction's"
    elif not 1 <= cfg.min_words <= cfg.max_words:
        wrong = (
            f"min_words={cfg.min_words} and max_words={cfg.max_words}, "
            "expected 1 <= min_words <= max_words"
        )
    elif not 0.5 <= cfg.near_duplicate_threshold <= 1:
        wrong = f"near_duplicate_threshold={cfg.near_duplicate_threshold}, expected 0.5 to 1"
    if wrong:
        raise UserError(f"the docstrings task has {wrong}; set the field to a value in range")


@functools.cache
def examples(cfg: Docstrings) -> tuple[Example, ...]:
    """Returns the examples by name: prompt, the docstring's first line, `file:function`, package.

    Left out are the library's tests, generated files, functions without a body of their own
    (`pass`, a bare `raise`), first lines that only repeat the function's name or its signature or
    that stop in the middle (no end of sentence, the text goes on), and all but the first of equal
    first lines for one name, of equal sources, and of near-duplicate sources.

    Raises:
        UserError: a field is out of range, or no function is left.
    """
    return from_documents(cfg, iter_stdlib(Stdlib()))


def from_documents(cfg: Docstrings, documents: Iterable[Document]) -> tuple[Example, ...]:
    """Returns the examples of Python files; see `examples`."""
    check(cfg)
    sketches, found, seen = Sketches(), [], set()
    for document in documents:
        group = package(document.id)
        if group in cfg.leave_out:
            continue
        for name, source, line in _functions(document):
            prompt = f"{cfg.instruction}\n\n```python\n{source}\n```\n\n"
            short = name.rsplit(".", 1)[-1]
            if len(prompt) > cfg.max_prompt_chars or not _is_summary(short, line, cfg):
                continue
            where = f"{document.id}:{name}"
            # A copy under another name, in another class, in the other branch of an `if`.
            repeats = {where, (short, line.lower()), re.sub(rf"\b{short}\b", "", source)}
            if _source_lines(source) < cfg.min_source_lines or seen & repeats:
                continue
            seen |= repeats
            sketches.add(Document(where, source))
            found.append(Example(prompt, line, where, group))
    # Before the parts are told apart: no part may have a near-duplicate of another's.
    kept, clusters = [], set()
    for example, cluster in zip(found, sketches.clusters(cfg.near_duplicate_threshold).tolist()):
        if cluster not in clusters:
            clusters.add(cluster)
            if belongs(example.group, cfg.part, cfg.test_fraction):
                kept.append(example)
    if not kept:
        raise UserError(
            "no function of the standard library fits the docstrings task, expected some; "
            "raise max_prompt_chars, max_words or test_fraction"
        )
    return tuple(kept)


def package(file: str) -> str:
    """The top-level package of a library file, a module's private half (`_pyio`) under its name."""
    top = file.split("/")[0].removesuffix(".py")
    return top.removeprefix("_py" if top.startswith("_py") else "_") or top


def _functions(document: Document) -> Iterator[tuple[str, str, str]]:
    """Yields (qualified name, source without docstring, docstring's first line), top to bottom."""
    if _GENERATED.search(document.text[:600]):
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # Of the file's own escapes.
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError):  # Templates and files for other versions.
        return
    lines = document.text.split("\n")  # Not splitlines(): a form feed ends no line of Python.

    def walk(node: ast.AST, path: str) -> Iterator[tuple[str, str, str]]:
        for child in ast.iter_child_nodes(node):
            inside = path
            if isinstance(child, (*_FUNCTIONS, ast.ClassDef)):
                inside = f"{path}.{child.name}" if path else child.name
            if isinstance(child, _FUNCTIONS):
                part = _without_docstring(child, lines)
                if part is not None:
                    yield inside, *part
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                yield from walk(child, inside)

    yield from walk(tree, "")


def _without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> tuple[str, str] | None:
    """Returns the source without the docstring, and its first line; None where either is empty."""
    text = ast.get_docstring(node)
    body = node.body[1:]
    if not text or not any(_does_something(statement) for statement in body):
        return None
    docstring = node.body[0]
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    # A docstring that shares its lines with code (`def f(): "..."; return 1`) is not cut out.
    if docstring.lineno <= node.lineno or body[0].lineno <= (docstring.end_lineno or 0):
        return None
    kept = lines[start - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    while kept and not kept[-1].strip():
        kept.pop()
    # Not dedent(): a string over several lines may stand further left than the function.
    indent = kept[0][: len(kept[0]) - len(kept[0].lstrip())]
    source = "\n".join(line.removeprefix(indent).rstrip() for line in kept)
    first, _, rest = text.strip().partition("\n")
    goes_on = bool(rest) and bool(rest.split("\n")[0].strip())
    if goes_on and not first.rstrip().endswith((".", "!", "?", ":")):
        return None
    return source, first.strip()


def _does_something(statement: ast.stmt) -> bool:
    """Whether a statement is more than `pass`, `...`, a string or a bare raise."""
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    return not isinstance(statement, ast.Pass | ast.Raise)


def _is_summary(name: str, line: str, cfg: Docstrings) -> bool:
    """Whether a first line is a sentence in words that says more than the function's name."""
    count = len(line.split())
    if not cfg.min_words <= count <= cfg.max_words or not line.isascii():
        return False
    # A signature, a doctest, a rule or a heading in a docstring's own markup.
    head, bracket, _ = line.partition("(")
    if bracket and head.split(".")[-1].strip("`* ") == name or _MARKUP.search(line):
        return False
    return bool(_words(line) - _words(name) - _FILLERS)


def _words(text: str) -> set[str]:
    """The words of a sentence or of an identifier, in lower case, verbs in their short form."""
    parts: list[str] = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)
    words = {word.lower() for word in parts}
    return {_VERBS.get(word, word) for word in words}


def _source_lines(source: str) -> int:
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") for line in source.split("\n")
    )
