"""The demo end to end, a few steps of each run."""

import dataclasses
import pathlib

import pytest

from jaxreason.core import platform
from jaxreason.recipes import demo
from jaxreason.train.log import read_metrics

TEXT = pathlib.Path(__file__).parent.parent / "fixtures" / "text"


@pytest.fixture
def short(monkeypatch):
    """The demo's configs with little of everything."""
    configs = demo.configs

    def small(folder):
        out = {}
        for name, cfg in configs(folder).items():
            model = dataclasses.replace(cfg.model, d_model=32, num_layers=2, d_ff=48, layers="scan")
            data = dataclasses.replace(
                cfg.data, path=str(TEXT), seq_len=32, batch_size=8, held_out_batches=2
            )
            train = dataclasses.replace(cfg.train, steps=8, log_every=2, eval_every=4)
            out[name] = dataclasses.replace(
                cfg, model=model, data=data, train=train, compute_dtype="float32"
            )
        return out

    monkeypatch.setattr(demo, "configs", small)
    monkeypatch.setattr(platform, "compilation_cache", lambda: None)


def test_demo_trains_three_runs_and_reports(short, tmp_path, capsys):
    folder = tmp_path / "demo"
    report = demo.run(str(folder))
    assert report == demo.epath.Path(folder / "report.html")
    printed = capsys.readouterr().out
    for word in ("baseline", "let", "teacher", "bits/byte", "speed-up", "wall time"):
        assert word in printed
    losses = {name: read_metrics(folder / name) for name in demo.NAMES}
    assert all(rows[-1]["step"] == 8 for rows in losses.values())
    # Both students start from the same weights and see the same batches.
    first = {name: [r for r in rows if r["kind"] == "eval"][0] for name, rows in losses.items()}
    assert first["let"]["loss"] == first["baseline"]["loss"]
    assert first["teacher"]["loss"] != first["baseline"]["loss"]
    page = (folder / "report.html").read_text()
    assert "<svg" in page and 'src="http' not in page and 'href="http' not in page
    # A finished demo is kept; the next one has a folder of its own.
    assert demo.choose_folder(str(folder)).name == "demo-2"
