"""Help, docstrings and differences of configs."""

import dataclasses
import subprocess
import sys

import pytest
from fixtures.config.toy import (
    FULL,
    RECIPES,
    Let,
    Lm,
    Root,
    parse,
)

from jaxreason import config, config_help, config_types


@pytest.fixture
def run(tmp_path):
    """Parses overrides on top of a saved default Root."""
    config.save(Root(), tmp_path / "run.json")
    return lambda *argv: parse(f"--config={tmp_path / 'run.json'}", *argv).config


def test_attribute_docstrings():
    docs = {name: doc for name, (_, _, doc) in config_types.fields(Root).items()}
    assert docs["seed"] == "Base of every random key."  # inherited
    assert docs["train"] == "The loop."
    docs = {name: doc for name, (_, _, doc) in config_types.fields(Let).items()}
    assert docs["lambda_0"] == "Initial weight of the alignment term (paper)."
    assert docs["undocumented"] == "" and docs["align"] == ""
    made = dataclasses.make_dataclass("Made", [("x", int, 1)], frozen=True)
    assert "--config.x  int = 1" in config.describe(made)


def test_describe_shows_types_values_and_the_classes_not_in_use():
    text = config.describe(Root, width=100)
    for line in [
        "--config.train.lr  float = 0.001\n    Peak learning rate.",
        "--config.train  Train\n",
        "--config.objective  Lm | Let = Lm\n",
        "--config.train.dtype  'auto' | 'float32' | 16 = 'auto'",
        "--config.train.remat  bool = false",
        "--config.phases  tuple[Phase, ...] = [Phase, Phase]",
        "--config.phases.1.until  int = 20",
        "--config.sizes  tuple[int, ...] = [1, 2, 3]",
        '--config.mixture  dict[str, float] = {"wiki": 0.5}',
        "--config.teacher  Teacher | None = None",
        "Where config.objective is Let:\n--config.objective.lambda_0  float = 0.1\n",
        "Where config.teacher is Teacher:\n--config.teacher.path  str  (required)\n",
    ]:
        assert line in text, line
    assert "Where config.objective is Lm" not in text and "is Root" not in text
    text = config.describe(FULL, width=60)
    assert "--config.objective.align  'last' | 'first' = 'first'" in text
    assert "--config.teacher.path  str = 'a/b'" in text and "is Teacher" not in text
    assert all(len(line) <= 60 for line in text.splitlines() if " " in line.strip())


def test_the_values_that_describe_shows_can_be_typed_back(run):
    for path, tp, value, _ in config_types.walk(Root(), "config"):
        text = config_help._value(value, tp).removeprefix(" = ")
        if isinstance(value, int | float | tuple | dict | None) and "Phase" not in text:
            assert run(f"--{path}={text}") == Root()


def test_help(tmp_path):
    text = parse("--help").help
    assert text and "--compile_for=STR\n    A topology" in text and "--config.train.lr" in text
    config.save(Root(), tmp_path / "run.json")
    command = parse(f"--config={tmp_path}/run.json", "--config.seed=77", "-h")
    assert command.help and "--config.seed  int = 77" in command.help
    text = config.parse(["--help"], recipes=RECIPES).help
    assert text and "Recipes: run (Root), other (Other)." in text


def test_diff():
    assert config.diff(FULL, FULL) == []
    b = dataclasses.replace(
        FULL,
        seed=1,
        objective=Lm(),
        phases=FULL.phases[:1],
        mixture={"b": 2.0, "c": 1.0},
        sizes=(1,),
    )
    assert config.diff(FULL, b) == [
        ("config.seed", 2**60, 1),
        ("config.objective", FULL.objective, Lm()),
        ("config.phases.1", FULL.phases[1], config.ABSENT),
        ("config.sizes", (), (1,)),
        ("config.mixture.b", 1.0, 2.0),
        ("config.mixture.a.txt", 2.0, config.ABSENT),
        ("config.mixture.c", config.ABSENT, 1.0),
    ]


def test_jax_is_not_imported():
    code = "import sys, jaxreason.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
