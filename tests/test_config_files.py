"""Config files: what is saved comes back, and a bad file ends in one line."""

import json
import os
import sys

import pytest
from fixtures.config.toy import (
    FULL,
    Other,
    Root,
    Teacher,
    error,
    parse,
)

from jaxreason import config


@pytest.fixture
def python(tmp_path):
    """Parses a config file with this text."""

    def call(text: str | bytes, arg: str = "", *argv: str):
        path = tmp_path / "file.py"
        head = "import dataclasses\nfrom fixtures.config.toy import *\n"
        path.write_bytes(text if isinstance(text, bytes) else (head + text).encode())
        return parse(f"--config={path}{arg}", *argv).config

    return call


def test_python_files(python):
    assert python("def get_config(arg=''):\n  return Root(seed=int(arg or 7))") == Root(seed=7)
    cfg = python("def get_config(arg=''):\n  return Root(seed=int(arg))", ":8", "--config.seed=9")
    assert cfg == Root(seed=9)
    assert python("def get_config():\n  return Root(train=Train(lr=1))").train.lr == 1.0
    before = set(sys.modules)
    text = (
        "from __future__ import annotations\nimport dataclasses, sys\n"
        "Root = sys.modules['fixtures.config.toy'].Root\n"
        "@dataclasses.dataclass\nclass Own:\n  x: dataclasses.InitVar[int] = 3\n"
        "def get_config(arg=''):\n  return Root()"
    )
    assert python(text.encode()) == Root()
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def get_config(arg=''):\n  return 1 / 0", "file.py:4: ZeroDivisionError: division by"),
        ("x = (\n", "file.py:3: SyntaxError: '(' was never closed"),
        ("import no_such_module_", "file.py:3: ModuleNotFoundError: No module named"),
        ("raise SystemExit('bye')", "file.py:3: SystemExit: bye"),
        ("raise ValueError('a\\nb')", "file.py:3: ValueError: a b"),
        ("from jaxreason.core.errors import UserError\nraise UserError('x')", "file.py:4: x"),
        ("get_confg = 1", 'file.py: no get_config(arg="") in this file'),
        ("def get_config(arg=''): pass", "file.py: get_config returned None (NoneType), expected"),
        ("def get_config(arg=''): return Train()", "(Train), expected a Root or Other"),
        ("def get_config(arg=''): return Root", "(type), expected a Root or Other"),
        (
            "def get_config(arg=''): return Root(train=Train(stpes=3))",
            "file.py:3: TypeError: Train.__init__() got an unexpected keyword argument 'stpes'",
        ),
        (
            "def get_config(arg=''): return Root(train=Train(steps='3'))",
            "file.py: config.train.steps: got '3', expected int",
        ),
        (
            "def get_config(arg=''): return Root(train=Train(remat=1))",
            "config.train.remat: got 1, expected bool",
        ),
        (
            "def get_config(arg=''): return Root(seed=True)",
            "config.seed: got True, expected int",
        ),
        (
            "def get_config(arg=''): return Root(seed=0.5)",
            "config.seed: got 0.5, expected int",
        ),
        (
            "def get_config(arg=''): return Root(train=Train(lr=10**400))",
            "config.train.lr: got 1000",
        ),
        (
            "def get_config(arg=''): return Root(seed=0, train=Train(lr=10**5000), sizes=(1,'a'))",
            "config.train.lr: got <int>, expected float",
        ),
        (
            "def get_config(arg=''): return Root(sizes=[1, 2])",
            "config.sizes: got [1, 2] (list), expected tuple[int, ...]",
        ),
        (
            "def get_config(arg=''): return Root(sizes=(1, 'a'))",
            "config.sizes.1: got 'a', expected int",
        ),
        (
            "def get_config(arg=''): return Root(mixture={1: 2.0})",
            "config.mixture (a key): got 1, expected str",
        ),
        (
            "def get_config(arg=''): return Root(train={'steps': 3})",
            "config.train: got {'steps': 3} (dict), expected Train",
        ),
        (
            "def get_config(arg=''): return Root(objective=Train())",
            "(Train), expected Lm | Let",
        ),
        (
            "def get_config(arg=''): return Root(objective=Let(align='lsat'))",
            "config.objective.align: got 'lsat', expected 'last' | 'first'; did you mean 'last'?",
        ),
    ],
)
def test_a_wrong_python_file_is_one_line(python, text, expected):
    assert expected in error(python, text)


def test_a_keyword_typo_names_the_nearest_field(python):
    text = "def get_config(arg=''): return Root(train=Train(stpes=3))"
    assert "id you mean 'steps'?" in error(python, text)


def test_files_that_cannot_be_read(python, tmp_path):
    assert "not UTF-8 text (byte 0xff at offset 4)" in error(python, b"x = \xff")
    (tmp_path / "run.json").write_bytes(b'{"a": "\xe9"}')
    assert "run.json: not UTF-8 text" in error(parse, f"--config={tmp_path}/run.json")
    for name, expected in [
        ("fil.py", "there is no such file; did you mean 'file.py'?"),
        ("run.jsn.json", "there is no such file"),
        ("", "is a directory; expected a file"),
        ("run.yaml", "expected FILE.py, FILE.py:ARG or a saved FILE.json"),
        ("a\0b.json", "cannot be read"),
        ("x" * 5000 + ".py", "cannot be read: File name too long"),
        ("file.py/x.json", "cannot be read: Not a directory"),
    ]:
        assert expected in error(parse, f"--config={tmp_path}/{name}")
    config.save(Root(), tmp_path / "config.json")
    expected = f"is a directory; expected a file; did you mean {tmp_path}/config.json?"
    assert expected in error(parse, f"--config={tmp_path}/")
    (tmp_path / "folder.py").mkdir()
    assert "Is a directory" in error(parse, f"--config={tmp_path}/folder.py")
    assert "cannot be read" in error(parse, "--config=nosuchscheme://a/b.json")
    assert "expected FILE.py" in error(parse, "--config=")
    if os.getuid():
        (tmp_path / "secret.json").touch(0)
        assert "Permission denied" in error(parse, f"--config={tmp_path}/secret.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n  "_type": "Root",\n  "seed": ,\n}', "malformed JSON, line 3 column 11: Expecting"),
        ("", "malformed JSON, line 1 column 1"),
        ("[" * 200_000, "malformed JSON"),
        ('{"_type": "Root", "seed": ' + "9" * 5000 + "}", "malformed JSON: Exceeds the limit"),
        ("[]", "expected an object with _type Root or Other and its fields"),
        ('{"seed": 1}', "expected an object with _type Root or Other and its fields"),
        ('{"_type": "Rot"}', "got _type 'Rot', expected _type Root or Other; did you mean 'Root'"),
        ('{"_type": "Train"}', "got _type 'Train', expected _type Root or Other"),
        ('{"_type": ["Root"]}', "got _type ['Root'], expected _type Root or Other"),
        ('{"_type": "Other"}', "config.needed: missing; Other needs it (int)"),
        ('{"_type": "Root", "sed": 1}', "config.sed: Root has no field 'sed'; did you mean 'seed'"),
        ('{"_type": "Root", "objective": {"_type": "os.system"}}', "got _type 'os.system'"),
        ('{"_type": "Root", "train": {"_type": "Let"}}', "got _type 'Let', expected _type Train"),
        ('{"_type": "Root", "train": {"lr": NaN}}', "config.train.lr: got nan, expected float"),
        ('{"_type": "Root", "train": {"steps": 1e400}}', "config.train.steps: got inf"),
        ('{"_type": "Root", "betas": [1]}', "config.betas: got [1] (list), expected tuple[float"),
        (
            '{"_type": "Root", "train": {"note": "\\ud800"}}',
            "config.train.note: got '\\ud800', expected valid UTF-8",
        ),
        ('{"_type": "Root", "mixture": {"\\ud800": 1}}', "(a key)"),
    ],
)
def test_a_wrong_json_file_is_one_line(tmp_path, text, expected):
    (tmp_path / "run.json").write_text(text)
    message = error(parse, f"--config={tmp_path}/run.json")
    assert message.startswith(f"{tmp_path}/run.json: ") and expected in message


def test_a_config_written_by_hand_or_with_a_bom_takes_defaults(tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(b'\xef\xbb\xbf{"_type": "Root", "seed": 3.0}')
    cfg = parse(f"--config={path}").config
    assert cfg == Root(seed=3) and type(cfg.seed) is int


def test_save_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "run.json"
    config.save(Root(), path)
    assert "config.seed" in error(config.save, Root(seed="x"), path)  # type: ignore
    assert config.load(path.read_text(), [Root]) == Root()
    assert "cannot write" in error(config.save, Root(), path / "below.json")
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("cfg", [Root(), FULL, Root(teacher=Teacher(path=""), window=3)])
def test_dump_and_load_round_trip(cfg, tmp_path):
    text = config.dump(cfg)
    again = config.load(text, [Root, Other])
    assert again == cfg and config.dump(again) == text
    config.save(cfg, tmp_path / "new" / "run.json")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run.json"]
    assert parse(f"--config={tmp_path}/new/run.json").config == cfg
    json.loads(text, parse_constant=pytest.fail)  # strict JSON: no Infinity


def test_tags_stand_at_the_root_and_at_choices_only():
    plain = json.loads(config.dump(FULL))
    assert plain["_type"] == "Root" and plain["objective"]["_type"] == "Let"
    assert plain["phases"][0]["objective"]["_type"] == "Let"
    assert "_type" not in plain["train"] and "_type" not in plain["phases"][0]
    assert "_type" not in plain["teacher"]  # Teacher | None leaves no choice
