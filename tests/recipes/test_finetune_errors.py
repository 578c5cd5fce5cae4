"""A user's mistake in fine-tuning ends in one line and exit code 2, and nothing is written."""

import json
import pathlib

import pytest
from support import REPO
from tiny_models import write_folder

from jaxreason.main import main

TINY = f"--config={REPO}/tests/fixtures/tiny_finetune.py"


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> pathlib.Path:
    room = tmp_path_factory.mktemp("errors")
    write_folder(room / "base")
    pair = {"prompt": "a: ", "completion": "b"}
    lines = [json.dumps(pair | {"prompt": f"{i}: "}) for i in range(40)]
    (room / "data.jsonl").write_text("\n".join(lines))
    (room / "broken.jsonl").write_text(lines[0] + '\n{"prompt": "x"}')
    (room / "empty.jsonl").write_text("")
    chat = {"messages": [{"role": "user", "content": "x"}, {"role": "bot", "content": "y"}]}
    (room / "roles.jsonl").write_text(json.dumps(chat))
    (room / "chat.jsonl").write_text("\n".join(_chat(i) for i in range(40)))
    (room / "bad").mkdir()
    for path in (room / "base").iterdir():
        (room / "bad" / path.name).write_bytes(path.read_bytes())
    (room / "bad/chat_template.jinja").write_text("{{ raise_exception('no chats') }}")
    return room


def _chat(number: int) -> str:
    user, reply = {"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "y"}
    return json.dumps({"messages": [user, reply]})


WRONG = {
    "no base": (["--config.init.path="], ["init.path is empty"]),
    "base that is not there": (["--config.init.path={room}/nobody"], ["nobody", "does not exist"]),
    "base that is a file": (["--config.init.path={room}/empty.jsonl"], ["empty.jsonl is a file"]),
    "no examples": (["--config.data.path="], ["data.path is empty"]),
    "file that is not there": (["--config.data.path={room}/no.jsonl"], ["no.jsonl"]),
    "missing field": (["--config.data.path={room}/broken.jsonl"], ["line 2", "'completion'"]),
    "empty file": (["--config.data.path={room}/empty.jsonl"], ["empty.jsonl is empty"]),
    "unknown role": (["--config.data.path={room}/roles.jsonl"], ["unknown role 'bot'", "line 1"]),
    "longer than the row": (["--config.data.seq_len=4"], ["data.seq_len is 4", "data.too_long"]),
    "template refuses": (
        ["--config.data.path={room}/chat.jsonl", "--config.init.path={room}/bad"],
        ["chat.jsonl:", "no chats"],
    ),
    "batch": (["--config.train.accumulate=3"], ["data.batch_size 8", "train.accumulate 3"]),
    "mesh": (["--config.mesh.fsdp=3"], ["mesh", "device"]),
    "target": (["--config.lora.targets=attn/qq"], ["attn/qq", "did you mean"]),
    "rank": (["--config.lora.rank=0"], ["lora.rank is 0"]),
    "muon": (["--config.optim.name=muon"], ["optim.name is muon"]),
    "other shape": (["--config.model.d_model=48"], ["model.", "leave `model`"]),
    "other base": (["--config.base.sha256=abc"], ["another model than the run's base"]),
    "compile_for": (["--compile_for=tpu:v5p:4x4"], ["shape '4x4'", "v5p takes"]),
    "no folder": (["--config.run.dir="], ["run.dir is not set"]),
    "typo": (["--config.data.pakcing=none"], ["did you mean", "packing"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake(name, room, capsys):
    given, said = WRONG[name]
    argv = [
        f"{TINY}:lora", f"--config.run.dir={room}/new", f"--config.init.path={room}/base",
        f"--config.data.path={room}/data.jsonl", *(arg.format(room=room) for arg in given),
    ]  # fmt: skip
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    for part in said:
        assert part in err
    assert not (room / "new").exists()


def test_help_has_every_field_with_its_docstring(capsys):
    assert main([f"{TINY}:lora", "--help"]) == 0
    out = capsys.readouterr().out
    for part in (
        "lora.rank",
        "data.learned_turns",
        "init.path",
        "base.sha256",
        "The model to fine-",
    ):
        assert part in out
