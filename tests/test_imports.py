"""The rooms of the house and the arrows between them, held by reading every import.

An arrow says what a room may import. Nothing imports upward; nothing imports sideways unless it is
in the table. Imports inside functions and relative imports count like any other.
"""

import ast
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator

import pytest
from support import REPO

MODELS = {"core", "nn", "models"}
LIBRARY = MODELS | {"depth", "objectives", "advantages", "rollout", "eval", "train", "data"}
LIBRARY |= {"rewards", "config"}
MAY_IMPORT = {
    "core": set(),
    "nn": {"core"},
    "models": {"core", "nn"},
    "depth": MODELS,
    "objectives": MODELS,
    "advantages": MODELS,
    "eval": MODELS,
    "rollout": MODELS | {"depth"},
    "train": {"core"},
    "data": {"core"},
    "rewards": {"core"},
    "config": {"core"},
    "recipes": LIBRARY,
    "main": LIBRARY | {"recipes"},
    "generate": LIBRARY | {"recipes"},
    "lm_eval": LIBRARY | {"recipes"},
    "convert": LIBRARY | {"recipes"},
}
FORBIDDEN = {"torch", "tensorflow"}
# Comparisons with other systems live in benchmarks/, the one place that may import those.
FOLDERS = ("jaxreason", "tests", "experiments", "launch", "benchmarks")
MAX_LINES = 400

Import = tuple[int, str, bool]  # line, dotted name, whether it is inside a function


def python_files(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (REPO / folder).rglob("*.py"))


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Yields every import of a module's source as absolute dotted names."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    drop = child.level - 1 if is_package else child.level
                    parents = module.split(".")
                    base = ".".join([*parents[: len(parents) - drop], *filter(None, [base])])
                yield from ((child.lineno, f"{base}.{alias.name}", lazy) for alias in child.names)
            elif isinstance(child, ast.Call):
                name = child.func.attr if isinstance(child.func, ast.Attribute) else None
                name = child.func.id if isinstance(child.func, ast.Name) else name
                first = child.args[0] if child.args else None
                if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                    yield child.lineno, str(first.value), lazy
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, lazy or is_function)

    yield from walk(ast.parse(source), False)


def room_of(name: str) -> str:
    """Returns the room of a dotted name inside the package; the config_* files are one room."""
    room = name.split(".")[1]
    return "config" if room.startswith("config_") else room


def wrong_arrows(source: str, module: str, is_package: bool = False) -> list[str]:
    """Returns a line for each import that the table does not allow."""
    if "." not in module:
        return []  # jaxreason/__init__.py itself belongs to no room
    room = room_of(module)
    if room not in MAY_IMPORT:
        return [f"{module}: the room {room!r} is not in the table of arrows"]
    wrong = []
    for line, name, _ in imports(source, module, is_package):
        parts = name.split(".")
        if parts[0] != "jaxreason" or len(parts) == 1 or parts[1].startswith("__"):
            continue
        other = room_of(name)
        if other != room and other not in MAY_IMPORT[room]:
            wrong.append(f"{module}:{line} imports {name}; {room} may not import {other}")
    return wrong


def module_name(path: pathlib.Path) -> tuple[str, bool]:
    parts = path.relative_to(REPO).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if is_package else parts), is_package


def test_the_arrows_hold():
    files = python_files("jaxreason")
    assert len(files) > 10
    wrong = [line for path in files for line in wrong_arrows(path.read_text(), *module_name(path))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("jaxreason.train.loop", "from jaxreason.core import mesh", True),
        ("jaxreason.train.loop", "from . import state", True),
        ("jaxreason.train.loop", "from jaxreason.models import decoder", False),
        ("jaxreason.train.loop", "from ..objectives.let import Let", False),
        ("jaxreason.train.loop", "from .. import objectives", False),
        ("jaxreason.train.loop", "from jaxreason import objectives", False),
        ("jaxreason.train.loop", "def f():\n  import jaxreason.recipes.pretrain", False),
        ("jaxreason.core.mesh", "if True:\n  from jaxreason.nn import rope", False),
        ("jaxreason.objectives.let", "from jaxreason.depth import first", False),
        ("jaxreason.objectives.let", "__import__('jaxreason.train')", False),
        ("jaxreason.rollout.sample", "from jaxreason.depth import first", True),
        ("jaxreason.recipes.pretrain", "from jaxreason import main", False),
        ("jaxreason.main", "from jaxreason.recipes import pretrain", True),
        ("jaxreason.config_help", "from jaxreason.config_types import fields", True),
        ("jaxreason.config_help", "from jaxreason.train import log", False),
        ("jaxreason.helpers", "", False),
    ],
)  # fmt: skip
def test_a_wrong_arrow_is_seen(module: str, source: str, allowed: bool):
    assert (wrong_arrows(source, module) == []) is allowed


def test_a_relative_import_of_a_package_is_resolved():
    names = [name for _, name, _ in imports("from . import a\nfrom ..b import c", "j.data", True)]
    assert names == ["j.data.a", "j.b.c"]


def test_other_frameworks_stay_outside():
    wrong = [
        f"{path.relative_to(REPO)}:{line} imports {name}"
        for path in python_files(*(folder for folder in FOLDERS if folder != "benchmarks"))
        for line, name, _ in imports(path.read_text(), *module_name(path))
        if name.split(".")[0] in FORBIDDEN
    ]
    assert not wrong, "\n".join(wrong)


def distribution(name: str) -> str:
    """Returns the normalised name of the distribution that an import comes from."""
    root = name.split(".")[0]
    if root == "orbax":
        return "orbax-checkpoint"
    return {"wandb": "wandb", "tensorboardX": "tensorboardx"}.get(root, root.replace("_", "-"))


def declared() -> tuple[set[str], set[str], set[str]]:
    """Returns the names of the base dependencies, of those and [dev]'s, and of all."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]

    def names(lines: list[str]) -> set[str]:
        return {re.split(r"[\[<>=!~; ]", line)[0].lower().replace("_", "-") for line in lines}

    extras = project["optional-dependencies"]
    base = names(project["dependencies"])
    return base, base | names(extras["dev"]), base.union(*map(names, extras.values()))


def test_what_is_imported_is_declared():
    base, dev, every = declared()
    wrong, used = [], set()
    own = {
        "jaxreason",
        "experiments",
        "benchmarks",
        *(path.stem for path in (REPO / "tests").iterdir()),
    }
    for path in python_files("jaxreason", "tests", "experiments"):
        library = path.is_relative_to(REPO / "jaxreason")
        for line, name, lazy in imports(path.read_text(), *module_name(path)):
            if name.split(".")[0] in own | sys.stdlib_module_names:
                continue
            allowed = every if lazy else base if library else dev
            if library:
                used.add(distribution(name))
            if distribution(name) not in allowed:
                kind = "no dependency" if lazy else "no base dependency: import it where used"
                wrong.append(f"{path.relative_to(REPO)}:{line} imports {name}: {kind}")
    assert not wrong, "\n".join(wrong)
    assert base <= used, f"declared in pyproject.toml and never imported: {sorted(base - used)}"


def test_files_are_one_thing():
    files = python_files(*FOLDERS)
    long = [
        f"{path.relative_to(REPO)}: {lines} lines"
        for path in files
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    ]
    assert not long, "\n".join(long)
    drawers = [str(path.relative_to(REPO)) for path in files if path.stem in ("utils", "util")]
    assert not drawers, "a name for what is inside, please: " + " ".join(drawers)
