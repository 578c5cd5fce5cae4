"""LayerSkip from scratch: all weights, rates that grow with time, a plain model at the end."""

import shutil

import jax
import numpy as np
import optax
import pytest
from support import REPO

from jaxreason import config
from jaxreason.core.errors import UserError
from jaxreason.depth.layerskip import LayerSkipPretraining
from jaxreason.main import main
from jaxreason.models.decoder import ModelConfig
from jaxreason.recipes import open_model, pretrain
from jaxreason.recipes.methods import make_phases
from jaxreason.train import manifest
from jaxreason.train.log import read_metrics

TINY = f"--config={REPO}/tests/fixtures/tiny.py:layerskip"


def test_a_run_learns_its_exits_and_goes_on_bit_for_bit(tmp_path):
    command = [TINY, "--config.checkpoint.every_steps=6", "--config.train.eval_every=12"]
    assert main([*command, f"--config.run.dir={tmp_path / 'run'}"]) == 0
    train = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"] - 0.5
    assert train[-1]["exits"] < train[1]["exits"] - 0.5  # At step 0 no exit has a weight.
    # Layers {0, 2}, {0, 1} and {1, 2} in turn, the last always; e = 0, 0.2, 2.2.
    weights = [row["coefficient/nll"] for row in train[:3]]
    np.testing.assert_allclose(weights, [1, 2.2 / 2.4, 2.2 / 2.4], rtol=1e-6)
    model = open_model.open_model(tmp_path / "run", dtype="float32")
    assert model.depth is None and model.config.num_layers == 3
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(manifest.step_folder(tmp_path / "again/checkpoints", 12))
    assert main([*command, f"--config.run.dir={tmp_path / 'again'}"]) == 0
    again = open_model.open_model(tmp_path / "again", dtype="float32")
    for a, b in zip(*(jax.tree.leaves(m.params) for m in (model, again)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_flops_count_the_exits(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXREASON_CACHE", str(tmp_path))
    cfg = config.parse([TINY], recipes={"pretrain": pretrain.PretrainConfig}).config
    built = pretrain.build(cfg)
    (phase,) = built.phases
    # Layers {0, 2}, {0, 1} and {1, 2} in turn, of which layer 0 has no weight: 0, 1 and 1 exits.
    head = 2 * built.model.d_model * built.model.vocab_size * built.tokens
    assert built.flops(phase) - built.model_flops == pytest.approx(3 * head * 2 / 3)


def test_wrong_intervals_are_refused():
    model = ModelConfig(num_layers=3)
    with pytest.raises(UserError, match="interval is 23, the model has 3 layers"):
        make_phases(
            LayerSkipPretraining(), steps=3, optimiser=optax.sgd(1.0), student_layers=3, model=model
        )
