"""The command line of generation: what it prints and writes, and its one-line errors."""

import dataclasses
import json

import numpy as np
import pytest
from rollout_model import full_logprobs, greedy, tiny_model

from jaxreason import generate as cli
from jaxreason.core.errors import UserError

TEMPLATE = (
    "{% for m in messages %}{% if not m.role %}{{ raise_exception('no role') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }};{% endfor %}"
)


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr(cli, "compilation_cache", lambda: None)

    def open_model(path, dtype):
        if path != "tiny":
            raise UserError(f"no model at {path!r}")
        return dataclasses.replace(tiny_model(), chat_template=TEMPLATE)

    monkeypatch.setattr(cli, "open_model", open_model)

    def call(*argv, checkpoint="tiny"):
        code = cli.main([f"--checkpoint={checkpoint}", *argv])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_a_prompt_is_answered_on_stdout_and_timed_on_stderr(run):
    code, out, err = run("--prompt=Hello", "--max-new-tokens=12")
    model = tiny_model()
    tokens = greedy(model, model.tokenizer.encode("Hello"), 12)
    tokens = tokens[:-1] if tokens[-1] in model.eos_ids else tokens
    assert code == 0 and out == model.tokenizer.decode(tokens).rstrip("\ufffd") + "\n"
    assert err.count("\n") == 1 and "prefill 5 tokens" in err and "tokens/s" in err


def test_logprobs_are_a_table(run):
    code, out, _ = run("--prompt=Hello", "--max_new_tokens=5", "--logprobs")
    lines = out.splitlines()
    rows = [line.split("\t") for line in lines[lines.index("token\tlogprob\tsampling\ttext") + 1 :]]
    model = tiny_model()
    prompt = model.tokenizer.encode("Hello")
    table = full_logprobs(model, [*prompt, *(int(r[0]) for r in rows)])[len(prompt) - 1 :]
    assert code == 0 and len(rows) == 5
    for i, row in enumerate(rows):
        np.testing.assert_allclose(float(row[1]), table[i, int(row[0])], atol=1e-3)


def test_jsonl_in_and_out(run, tmp_path):
    entries = [
        {"prompt": "One", "id": 7},
        {"messages": [{"role": "user", "content": "Two"}]},
        {"prompt": "a longer third prompt"},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    argv = [f"--prompts={source}", "--temperature=0.9", "--top_p=0.9", "--n=2", "--seed=5"]
    argv += ["--max_new_tokens=8", "--slots=3", "--logprobs"]
    code, printed, _ = run(*argv, f"--out={out}")
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and printed == "" and [p.name for p in out.parent.iterdir()] == ["out.jsonl"]
    assert [(r["prompt_index"], r["sample_index"]) for r in records] == [
        (i, j) for i in range(3) for j in range(2)
    ]
    model = tiny_model()
    prompts = [model.tokenizer.encode(t) for t in ("One", "u:Two;", "a longer third prompt")]
    for record in records:
        assert entries[record["prompt_index"]].items() <= record.items()
        tokens, prompt = record["tokens"], prompts[record["prompt_index"]]
        table = full_logprobs(model, [*prompt, *tokens])[len(prompt) - 1 : -1]
        want = table[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(record["logprobs"], want, atol=1e-5)
        assert len(record["sampling_logprobs"]) == len(tokens)
    code, printed, _ = run(*argv)
    assert [json.loads(line) for line in printed.splitlines()] == records


def test_samples_are_listed_and_a_message_goes_through_the_template(run):
    how = ("--max_new_tokens=6", "--temperature=1", "--n=3", "--seed=2", "--system=S")
    code, out, _ = run("--message=Hi", *how)
    assert code == 0 and [f"--- {i} (" in out for i in range(3)] == [True] * 3


def test_stop_strings_are_taken_as_they_are(run):
    _, whole, _ = run("--prompt=Hello", "--max_new_tokens=20")
    first, second = whole[6:8], whole[3:5]
    code, out, _ = run(
        "--prompt=Hello", "--max_new_tokens=20", f"--stop={first}", f"--stop={second}"
    )
    assert code == 0
    assert out.rstrip("\n") == whole[: min(whole.find(first), whole.find(second))].rstrip("\n")


def test_chat_reads_stdin(run, monkeypatch):
    lines = iter(["Hi", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, err = run("--chat", "--max_new_tokens=4")
    assert code == 0 and out.startswith("/reset") and "decode" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--prompt=x", "--temprature=1"], "did you mean 'temperature'"),
        (["--prompt=x", "--top_k=1.5"], "--top_k"),
        (["--prompt=x", "--temperature=hot"], "--temperature"),
        (["--prompt=x", "--temperature=-1"], "temperature is -1"),
        (["--prompt=x", "--top_p=0"], "top_p is 0"),
        (["--prompt=x", "--n=0"], "--n is 0"),
        (["--prompt=x", "--n=2"], "temperature 0 are equal"),
        (["--prompt=x", "--max_new_tokens=0"], "--max_new_tokens is 0"),
        (["--prompt=x", "--dtype=float16"], "--dtype"),
        (["--prompt=x", "--chat"], "got --prompt and --chat"),
        (["--prompt"], "--prompt needs a value"),
        (["x"], "unknown flag 'x'"),
        ([], "got none"),
        (["--prompt=x", "--checkpoint="], "--checkpoint is missing"),
        (["--prompt=x", "--checkpoint=other"], "no model at 'other'"),
        (["--prompt=x", "--system=y"], "--system belongs"),
        (["--chat", "--out=x"], "--chat streams"),
        (["--prompts=/nowhere.jsonl"], "cannot read '/nowhere.jsonl'"),
        (["--prompt=x", "--out=/"], "--out: cannot write"),
        (["--prompt=\udcff"], "not valid UTF-8"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(run, argv, says):
    code, out, err = run(*argv)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and says in errors[0], err
    assert "Traceback" not in err and not out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{}", "line 1: expected"),
        (b'{"prompt": "x"}\n{"prompt": 1}', "line 2: expected"),
        (b'{"prompt": "x", "messages": []}', "line 1: expected"),
        (b'{"messages": []}', "line 1: expected"),
        (b'{"messages": [{"role": "user"}]}', "line 1: expected"),
        (b"{", "line 1 is not JSON"),
        (b"[" * 100_000, "line 1"),
        (b"\n\n", "has no prompts"),
        (b"\xff\xfe", "cannot read"),
        (b'{"messages": [{"role": "", "content": "x"}]}', "line 1: the chat template refuses"),
    ],
)
def test_bad_prompt_files_are_one_line(run, tmp_path, content, says):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    code, out, err = run(f"--prompts={path}")
    assert code == 2 and says in err and "Traceback" not in err and not out, err


def test_help_lists_every_flag(run):
    code, out, _ = run("--help")
    assert code == 0
    for field in dataclasses.fields(cli.GenerateConfig):
        assert f"--{field.name}  " in out
