"""The flags of `generate` that skip layers."""

import dataclasses
import json

import pytest
from rollout_model import tiny_model
from skip_model import constant, tiny

from jaxreason import generate as cli
from jaxreason.core.errors import UserError
from jaxreason.rollout import GREEDY, generate, prepare

SET = (True, True, False, True)


@pytest.fixture
def run(monkeypatch, capsys):
    models = {"plain": tiny(), "routed": constant(SET, "decode_only")}
    monkeypatch.setattr(cli, "compilation_cache", lambda: None)
    monkeypatch.setattr(cli, "open_model", lambda path, dtype: models[path])

    def call(checkpoint, *argv):
        code = cli.main([f"--checkpoint={checkpoint}", "--max_new_tokens=8", *argv])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def texts(model, prompts, **how):
    return [c.text for c in generate(model, prompts, GREEDY, max_new_tokens=8, **how)]


def test_layers_by_flag_and_by_routers_go_into_the_jsonl(run, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["One", "another one"]
    source.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))

    def records(checkpoint, *argv):
        code, _, err = run(checkpoint, f"--prompts={source}", f"--out={out}", *argv)
        assert code == 0, err
        return [json.loads(line) for line in out.read_text().splitlines()], err

    given, err = records("plain", "--keep_layers=0-1,3", "--skip_stats")
    assert [r["layers"] for r in given] == [[0, 1, 3]] * 2
    assert "##.#" in err and "1 set of layers in 2 completions, batching union" in err
    routed, _ = records("routed", "--batching=group")
    assert [(r["text"], r["layers"]) for r in routed] == [(r["text"], r["layers"]) for r in given]
    assert [r["text"] for r in given] == texts(tiny(), prompts, keep=SET)
    everywhere, _ = records("routed", "--keep_layers=0,1,3", "--skip_scope=everywhere")
    want = texts(tiny(), prompts, keep=SET, skip_scope="everywhere")
    assert [r["text"] for r in everywhere] == want
    off, err = records("routed", "--skip=off", "--skip_stats")
    assert [r["text"] for r in off] == texts(tiny(), prompts)
    assert "layers" not in off[0] and "all layers ran" in err


def test_a_conversation_keeps_its_layers(run, monkeypatch):
    model = dataclasses.replace(tiny_model(), chat_template="{{ messages[-1].content }}")
    monkeypatch.setattr(cli, "open_model", lambda path, dtype: model)
    lines = iter(["One", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    code, out, err = run("plain", "--chat", "--keep_layers=1", "--skip_stats")
    want = texts(prepare(model, slots=1), ["One"], keep=(False, True))
    assert code == 0 and want[0] in out and " .#\n" in err


def test_what_the_flags_may_say():
    assert cli.keep_set("", 4) is None
    assert cli.keep_set("0-1,3", 4) == SET and cli.keep_set("none", 2) == (False, False)
    for bad in ("4", "2-1", "1-4", "a", "-1", "0,,1", "0-", "1.5", "²"):
        with pytest.raises(UserError, match="--keep_layers="):
            cli.keep_set(bad, 4)
    for argv in (["--skip=off", "--keep_layers=0"], ["--skip_scope=everywhere"]):
        with pytest.raises(UserError, match="--skip"):
            cli.parse(["--checkpoint=x", "--prompt=x", *argv])


def test_a_layer_that_is_not_there_is_told_in_a_line(run):
    code, out, err = run("plain", "--prompt=One", "--keep_layers=0-9")
    assert (code, out) == (2, "")
    assert err == "error: --keep_layers=0-9: '0-9' is not within the model's layers 0 to 3\n"
