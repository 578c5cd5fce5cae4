"""What a run leaves in its folder: a config that replays, facts, rows, a report."""

import json
import os
import pathlib
import re

import pytest
from support import REPO

from jaxreason.main import main
from jaxreason.train import load
from jaxreason.train.log import read_metrics, without_time

TINY = f"--config={REPO}/tests/fixtures/tiny.py"
CURVE = REPO / "tests/golden/loss_curve.json"


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> pathlib.Path:
    """A folder with the runs `teacher`, `let` and `baseline` of 20 steps."""
    room = tmp_path_factory.mktemp("folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXREASON_CACHE", str(room / "cache"))
        for arm in ("teacher", "let", "baseline"):
            teacher = [f"--config.teacher.path={room}/teacher"] if arm == "let" else []
            assert main([f"{TINY}:{arm}", *teacher, f"--config.run.dir={room}/{arm}"]) == 0
    return room


@pytest.fixture(autouse=True)
def cache(room, monkeypatch):
    monkeypatch.setenv("JAXREASON_CACHE", str(room / "cache"))


def curve(run: pathlib.Path) -> dict[str, list[float]]:
    """Losses of a run by kind of row, and the alignment while there is one."""
    rows = read_metrics(run)
    pick = lambda kind, key: [r[key] for r in rows if r["kind"] == kind and key in r]  # noqa: E731
    return {
        "train_loss": pick("train", "loss"),
        "align_cosine": pick("train", "align_cosine"),
        "held_out_loss": pick("eval", "loss"),
        "held_out_bits_per_byte": pick("eval", "bits_per_byte"),
    }


def test_the_golden_loss_curve(room):
    """Twenty LET steps in float32 give the losses that they gave when the file was written.

    After a change that is meant to alter numbers, write it anew and look at the difference:

        JAXREASON_WRITE_GOLDEN=1 python -m pytest tests/recipes/test_run_folder.py -k golden
    """
    got = curve(room / "let")
    assert len(got["train_loss"]) == 20 and len(got["align_cosine"]) == 10
    if os.environ.get("JAXREASON_WRITE_GOLDEN"):
        CURVE.write_text(json.dumps(got, indent=1) + "\n")
    golden = json.loads(CURVE.read_text())
    assert got.keys() == golden.keys()
    for name, values in golden.items():
        assert got[name] == pytest.approx(values, rel=1e-4), name


def test_the_folder_holds_what_it_should(room):
    names = {path.name for path in (room / "let").iterdir()}
    files = {"config.json", "facts.json", "goodput.jsonl", "metrics.jsonl", "report.html"}
    assert names == {"checkpoints", *files}
    kept = sorted(path.name for path in (room / "let/checkpoints").iterdir())
    assert kept == ["00000010", "00000020"]
    saved = load.load_config(room / "let")
    assert saved == (room / "let/config.json").read_text()


def test_the_saved_config_replays(room):
    """The same losses from config.json alone: what decides numbers was not left to `auto`."""
    command = [f"--config={room}/let/config.json", f"--config.run.dir={room}/again"]
    assert main(command) == 0
    first, again = (without_time(read_metrics(room / name)) for name in ("let", "again"))
    assert again == first
    one, two = (json.loads((room / name / "config.json").read_text()) for name in ("let", "again"))
    assert one["run"].pop("dir") != two["run"].pop("dir") and one == two
    assert one["compute_dtype"] == "float32" and one["model"]["vocab_size"] > 0
    facts = json.loads((room / "let" / "facts.json").read_text())
    assert (facts["kernels"], facts["attention"], facts["layers"]) == ("cpu", "cpu", "unroll")


def test_facts(room):
    let, teacher, baseline = (
        json.loads((room / name / "facts.json").read_text())
        for name in ("let", "teacher", "baseline")
    )
    layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert let["params_non_embedding"] == 2 * layer + 32
    assert let["params"] == let["params_non_embedding"] + 2 * 320 * 32
    assert let["teacher_params"] == teacher["params"] and let["teacher_step"] == 20
    assert let["corpus_sha256"] == teacher["corpus_sha256"] == baseline["corpus_sha256"]
    assert let["plan_sha256"] == baseline["plan_sha256"] and len(let["plan_sha256"]) == 64
    assert let["flops_per_step"] == baseline["flops_per_step"] < let["flops_per_step_with_teacher"]
    assert let["command"].startswith("python -m jaxreason.main --config=") and let["jax"]
    rows = [row for row in read_metrics(room / "let") if row["kind"] == "train"]
    assert rows[9]["flops"] == 10 * let["flops_per_step_with_teacher"]
    assert rows[19]["flops"] == rows[9]["flops"] + 10 * let["flops_per_step"]
    assert rows[19]["tokens"] == 20 * let["tokens_per_step"] == 20 * 8 * 32


def assert_self_contained(page: str) -> None:
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", page)
    assert not re.search(r"@import|url\((?!['\"]?(?:#|data:))|fetch\(|XMLHttpRequest", page)


def test_the_report_is_one_page(room):
    page = (room / "let/report.html").read_text()
    assert_self_contained(page)
    final = curve(room / "let")["held_out_loss"][-1]
    assert f"{final:.3f}"[:-1] in page and "jaxreason.main" in page and "<svg" in page


def test_report_and_compare_commands(room, capsys):
    capsys.readouterr()
    assert main(["compare", f"{room}/baseline", f"{room}/let"]) == 0
    out = capsys.readouterr().out
    for part in ("method.lambda_0", "teacher.path", "Held-out loss", "speed-up"):
        assert part in out
    final = curve(room / "let")["held_out_loss"][-1]
    assert f"{final:.4f}" in out and "Not comparable" not in out
    before = (room / "let/report.html").read_text()
    assert main(["report", f"{room}/let", f"--against={room}/baseline"]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    page = (room / "let/report.html").read_text()
    assert_self_contained(page)
    assert page != before and "baseline" in page


@pytest.mark.parametrize("argv", [["--help"], [f"{TINY}:let", "--help"]])
def test_help_lists_the_fields(argv, capsys):
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert not err
    for part in (
        "train.steps",
        "run.dir",
        "mesh.fsdp",
        "checkpoint.every_steps",
        "Optimiser updates",
    ):
        assert part in out
    assert ("method.lambda_0" in out) or len(argv) == 1
