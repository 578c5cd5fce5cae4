"""What the repository says of itself is true: commands, links, pins and golden arrays."""

import os
import pathlib
import re
import subprocess
import tomllib

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import REPO

# Paths of one machine and addresses of package indexes. Spelt so that this file does not match.
STRAY = re.compile(
    r"/(?:w[o]rk|f[a]rm|r[o]ot)/|\.\./s[h]ared|i[n]dex-url|f[i]nd-links|https?://[^ ]*/s[i]mple"
)
GUIDES = ("README.md", "CONTRIBUTING.md", "docs")


def repo_files() -> list[pathlib.Path]:
    """Returns the files that git tracks or would add."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    files = [REPO / name for name in names.split("\0") if name]
    return [path for path in files if path.is_file()]  # a tracked file may have been deleted


def guides() -> list[pathlib.Path]:
    paths = [REPO / name for name in GUIDES]
    return [file for p in paths for file in ([p] if p.is_file() else sorted(p.rglob("*.md")))]


def code_in(markdown: str) -> str:
    """Returns the code of a Markdown text: fenced or indented blocks and `spans`, line by line."""
    fences = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, flags=re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)
    blocks = re.findall(r"^ {4,}(.*)$", rest, flags=re.M)
    return "\n".join([*fences, *blocks, *re.findall(r"`([^`\n]+)`", rest)])


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", (REPO / "Makefile").read_text(), flags=re.M))


def module_file(name: str) -> pathlib.Path | None:
    path = REPO.joinpath(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__main__.py") if p.is_file()), None)


def test_no_path_or_index_of_one_machine():
    files = repo_files()
    assert len(files) > 20
    found = [
        f"{path.relative_to(REPO)}:{number}: {line.strip()[:80]}"
        for path in files
        for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), 1)
        if STRAY.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "parts", [("/wo", "rk/x"), ("a/ro", "ot/b"), ("../sha", "red"), ("--index", "-url"),
              ("find", "-links"), ("https://x.org/sim", "ple/")]
)  # fmt: skip
def test_a_stray_path_is_seen(parts: tuple[str, str]):
    assert STRAY.search("".join(parts))


def test_the_way_in_is_there():
    missing = [
        name
        for name in ("README.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", ".ci/run")
        if not (REPO / name).is_file()
    ]
    assert not missing, f"missing: {' '.join(missing)}"
    readme = code_in((REPO / "README.md").read_text())
    assert "make demo" in readme and "make test" in readme
    assert "Apache License" in (REPO / "LICENSE").read_text()
    assert os.access(REPO / ".ci/run", os.X_OK)
    assert "make test" in (REPO / ".ci/run").read_text()


def test_the_commands_of_the_guides_exist():
    wrong = []
    for guide in guides():
        code, where = code_in(guide.read_text()), guide.relative_to(REPO)
        for target in re.findall(r"(?:^|[;&] *)make ([a-z][a-z-]*)", code, flags=re.M):
            if target not in make_targets():
                wrong.append(f"{where}: make {target}")
        for module in re.findall(r"-m ((?:jaxreason|benchmarks|launch)[\w.]*)", code):
            if module_file(module) is None:
                wrong.append(f"{where}: python -m {module}")
        for config in re.findall(r"--config[= ]((?:experiments|tests)/[\w./]+\.py)", code):
            if not (REPO / config).is_file():
                wrong.append(f"{where}: --config={config}")
    assert not wrong, "named, and not there:\n" + "\n".join(wrong)


def test_the_links_of_the_guides_lead_somewhere():
    wrong = []
    for guide in guides():
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", guide.read_text()):
            if "://" not in link and not (guide.parent / link).exists():
                wrong.append(f"{guide.relative_to(REPO)}: {link}")
    assert not wrong, "\n".join(wrong)


def test_the_commands_of_the_makefile_exist():
    modules = re.findall(r"-m ((?:jaxreason|benchmarks)[\w.]*)", (REPO / "Makefile").read_text())
    assert modules
    missing = [name for name in modules if module_file(name) is None]
    assert not missing, f"the Makefile runs what is not there: {missing}"


def test_the_worked_example_of_a_method_works():
    text = (REPO / "CONTRIBUTING.md").read_text()
    method, test = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    names: dict = {"__name__": "norm_stabilizer"}
    exec(compile(method, "norm_stabilizer.py", "exec"), names)
    exec(compile(test, "test_norm_stabilizer.py", "exec"), names)
    names["test_only_pairs_inside_a_document_count"]()


def test_the_pins_fit_the_lower_bounds():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+]+", pin) for pin in pins), pins
    version = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in pins)}
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        need = Requirement(line)
        assert {part.operator for part in need.specifier} == {">="}, f"not a lower bound: {line}"
        got = version.get(canonicalize_name(need.name), "nothing")
        assert got != "nothing" and need.specifier.contains(got), f"{line} is pinned to {got}"
    for extra in project["optional-dependencies"].values():
        assert {part.operator for line in extra for part in Requirement(line).specifier} == {">="}


def test_golden_arrays_name_their_source():
    table = (REPO / "third_party/README.md").read_text()
    files = sorted((REPO / "tests/golden").glob("*.npz"))
    assert files
    for path in files:
        assert f"`{path.name}`" in table, f"{path.name} has no row in third_party/README.md"
        with np.load(path, allow_pickle=False) as arrays:
            assert arrays.files
