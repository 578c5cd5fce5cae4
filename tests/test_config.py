"""Flags and overrides: every form that is accepted, and one line for everything else."""

import dataclasses
import random
from pathlib import Path

import pytest
from fixtures.config.toy import (
    FULL,
    Let,
    Other,
    Phase,
    Root,
    Teacher,
    error,
    parse,
)

from jaxreason import config, config_help, config_types
from jaxreason.core.errors import UserError


@pytest.fixture
def run(tmp_path):
    """Parses overrides on top of a saved default Root."""
    config.save(Root(), tmp_path / "run.json")
    return lambda *argv: parse(f"--config={tmp_path / 'run.json'}", *argv).config


@pytest.mark.parametrize(
    ("flag", "where", "value"),
    [
        ("train.steps=200", "train.steps", 200),
        ("train.steps=2e2", "train.steps", 200),
        ("train.lr=3", "train.lr", 3.0),
        ("train.clip=-inf", "train.clip", float("-inf")),
        ("train.remat=true", "train.remat", True),
        ("train.note=a=b --c", "train.note", "a=b --c"),
        ("train.note=", "train.note", ""),
        ("train.note=None", "train.note", None),
        ("train.dtype=16", "train.dtype", 16),
        ("train.dtype=float32", "train.dtype", "float32"),
        ("betas=0.5,1", "betas", (0.5, 1.0)),
        ("betas=(0.5, 1)", "betas", (0.5, 1.0)),
        ("betas=[0.5, 1]", "betas", (0.5, 1.0)),
        ("betas.1=0.99", "betas", (0.9, 0.99)),
        ("sizes=", "sizes", ()),
        ("sizes=[]", "sizes", ()),
        ("sizes=7", "sizes", (7,)),
        ("sizes=7,", "sizes", (7,)),
        ("phases.1.until=100", "phases", (Phase(), Phase(name="rest", until=100))),
        ("phases.0.objective=Let", "phases.0.objective", Let()),
        ("phases=Phase", "phases", (Phase(),)),
        ('phases=[{"until": 5}]', "phases", (Phase(until=5),)),
        ("mixture.code=2", "mixture", {"wiki": 0.5, "code": 2.0}),
        ("mixture.a.txt=2", "mixture", {"wiki": 0.5, "a.txt": 2.0}),
        ('mixture={"x": 1}', "mixture", {"x": 1.0}),
        ('objective={"_type": "Let", "lambda_0": 1}', "objective", Let(lambda_0=1)),
        ("window=4", "window", 4),
        ("window=4,5", "window", (4, 5)),
        ("window=None", "window", None),
        ('teacher={"path": "x", "scale": 1}', "teacher", Teacher(path="x", scale=1.0)),
    ],
)
def test_override_forms(run, flag, where, value):
    got = run(f"--config.{flag}")
    for part in where.split("."):
        got = got[int(part)] if part.isdigit() else getattr(got, part)
    assert got == value and type(got) is type(value)


def test_overrides_apply_in_order_and_unions_switch_by_class_name(run):
    cfg = run("--config.objective=Let", "--config.objective.lambda_0=0.3", "--config.seed=1")
    assert cfg == Root(objective=Let(lambda_0=0.3), seed=1)
    cfg = run("--config.objective=Let", "--config.objective.lambda_0=0.3", "--config.objective=Let")
    assert cfg.objective == Let()


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("train.steps=abc", "config.train.steps: got 'abc', expected int"),
        ("train.steps=1.5", "config.train.steps: got '1.5', expected int"),
        ("train.steps=inf", "config.train.steps: got 'inf', expected int"),
        ("train.steps=true", "config.train.steps: got 'true', expected int"),
        ("train.lr=nan", "config.train.lr: got 'nan', expected float"),
        ("train.remat=1", "config.train.remat: got '1', expected bool (true or false)"),
        (
            "train.dtype=floot32",
            "config.train.dtype: got 'floot32', expected 'auto' | 'float32' | 16"
            "; did you mean 'float32'?",
        ),
        ("train.stepz=1", "Train has no field 'stepz'; did you mean 'config.train.steps'?"),
        ("lr=1", "config: Root has no field 'lr'; did you mean 'config.train.lr'?"),
        ("step=1", "config: Root has no field 'step'; did you mean 'config.train.steps'?"),
        (
            "until=1",
            "config: Root has no field 'until'; did you mean 'config.phases.0.until' or "
            "'config.phases.1.until'?",
        ),
        ("teacher.zzzzz=1", "config.teacher: is None, which has no field 'zzzzz'; first choose it"),
        ("objective.zzzzz=1", "Lm has no field 'zzzzz'; its fields are z_loss"),
        ("train.steps.x=1", "config.train.steps: is 100, which has no field 'x'"),
        ("objective=Lett", "got 'Lett', expected Lm | Let; did you mean 'Let'?"),
        ("teacher=Teacher", "config.teacher.path: missing; Teacher needs it (str)"),
        ("betas=1,2,3", "config.betas: got '1,2,3', expected tuple[float, float]"),
        ("betas=1,x", "config.betas.1: got 'x', expected float"),
        ("betas=[1,", "config.betas: malformed JSON, line 1 column 4: Expecting value"),
        ("betas.2=1", "config.betas: got the index '2', expected 0 to 1"),
        ("sizes.x=1", "config.sizes: got the index 'x', expected 0 to 2"),
        ("mixture.code=x", "config.mixture.code: got 'x', expected float"),
        ("mixture=x", "config.mixture: got 'x', expected dict[str, float]"),
        ('mixture={"x": "y"}', "config.mixture.x: got 'y', expected float"),
        ('mixture={"x": 1, "x": 2}', "key 'x' appears twice"),
        ('phases=[{"untill": 5}]', "config.phases.0.untill: Phase has no field 'untill'; did you"),
        ('objective={"lambda_0": 1}', "got an object without _type, expected _type Lm or Let"),
        ('train={"steps": "5"}', "config.train.steps: got '5', expected int"),
        ("window=x", "config.window: got 'x', expected int | tuple[int, ...] | None"),
        ("phases.0.until=0", "config.phases.0: until is 0; expected a positive number of steps"),
        ("train.steps=15", "config: the phases end after train.steps; raise train.steps"),
        ("train.note=\udcff", "config.train.note: got '\\udcff', expected valid UTF-8"),
    ],
)
def test_a_wrong_override_is_one_line(run, flag, expected):
    assert expected in error(run, f"--config.{flag}")


def test_children_are_validated_before_their_parents(run):
    message = error(run, "--config.train.steps=5", "--config.phases.1.until=-1")
    assert message.startswith("config.phases.1: until is -1")


def test_flags(tmp_path):
    config.save(Root(), tmp_path / "run.json")
    file = f"--config={tmp_path / 'run.json'}"
    command = parse(file, "--compile_for=v5e:2x2", "--dry")
    assert command.flags == {"compile_for": "v5e:2x2", "dry": True}
    assert command.recipe == "run" and command.help is None
    assert parse(file).flags == {"compile_for": None, "dry": None}
    assert parse(file, "--dry=false").flags["dry"] is False
    for argv, expected in [
        ([file, "--compile_form=1"], "'--compile_form=1'; did you mean '--compile_for'?"),
        (
            [file, "--zz"],
            "unknown argument '--zz'; expected --config, --compile_for, --dry, --help",
        ),
        ([file, "train.steps=1"], "unknown argument 'train.steps=1'"),
        ([file, "--compile_for"], "'--compile_for' has no value; write '--compile_for=VALUE'"),
        ([file, "--config.seed", "3"], "'--config.seed' has no value; write '--config.seed=3'"),
        ([file, "--config.train.remat"], "write '--config.train.remat=VALUE'"),
        (["--config", "a.py"], "'--config' has no value; write '--config=a.py'"),
        ([file, file], "--config is given twice"),
        ([file, "--dry", "--dry"], "--dry is given twice"),
        ([file, "--dry=x"], "--dry: got 'x', expected bool (true or false)"),
        (["--config.seed=3"], "no config given; write --config=FILE.py"),
        (["--dry"], "no config given"),
    ]:
        assert expected in error(parse, *argv)


def test_no_arguments_show_the_usage():
    with pytest.raises(config.Usage) as info:
        parse()
    text = str(info.value)
    assert text.startswith("usage: ") and text.count("--config=") == 3 and "--help" in text


def test_fields_of_a_type_that_is_not_supported_are_the_authors_mistake():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        x: Path = Path()

    with pytest.raises(TypeError, match="config.x: a config field cannot be of type Path"):
        config.check(Odd())


def _mutate(rng: random.Random, text: str) -> str:
    pieces = [
        "",
        ".",
        "=",
        ",",
        "None",
        "[",
        "{",
        '"',
        "\n",
        "\udcff",
        "-1",
        "1e999",
        "\0",
        "Let",
        "²",
    ]
    chars = list(text)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(chars) + 1)
        chars[i : i + rng.randint(0, 3)] = rng.choice([rng.choice(pieces), rng.choice(text), ""])
    return "".join(chars)


def test_no_mistake_ends_in_anything_but_one_line(tmp_path):
    rng, path, dumped = random.Random(0), tmp_path / "run.json", config.dump(FULL)
    seeds = [
        f"--{p}={config_help._value(v, t)[3:]}" for p, t, v, _ in config_types.walk(FULL, "config")
    ]
    accepted = 0
    for trial in range(400):
        text = dumped if trial % 2 else _mutate(rng, dumped)
        path.write_text(text, errors="surrogatepass")
        argv = [f"--config={path}", *rng.sample(seeds, 2)]
        if trial % 2:
            argv = [_mutate(rng, arg) if rng.random() < 0.7 else arg for arg in argv]
        try:
            cfg = parse(*argv).config
            assert cfg is None or config.load(config.dump(cfg), [Root, Other]) == cfg
            accepted += 1
        except UserError as mistake:
            assert len(str(mistake).splitlines()) == 1, str(mistake)
    assert 20 < accepted < 300  # the mutations are neither all harmless nor all fatal
