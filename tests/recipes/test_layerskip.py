"""LayerSkip's runs: what is trained is what runs, early and in full; resumed, opened, refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import LLAMA, write_folder

from experiments.layerskip import smollm2
from jaxreason.core.errors import UserError
from jaxreason.data import PairsConfig
from jaxreason.depth.layerskip import LayerSkip
from jaxreason.depth.sets import AllLayers, StaticSet
from jaxreason.eval.perplexity import make_eval_step, perplexity
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.nn.lora import LoraConfig
from jaxreason.recipes import first as recipe
from jaxreason.recipes import open_model
from jaxreason.recipes.execute import RunConfig
from jaxreason.recipes.first import SkippingConfig
from jaxreason.recipes.init import InitConfig
from jaxreason.train import manifest
from jaxreason.train.checkpoint import CheckpointConfig
from jaxreason.train.log import read_metrics
from jaxreason.train.loop import TrainConfig
from jaxreason.train.optim import OptimConfig

FOUR = dataclasses.replace(LLAMA, num_layers=4)
METHOD = LayerSkip(kept=2, dropout=0.3, interval=2)


def config(
    room: pathlib.Path, folder: str, method: StaticSet = METHOD, **changes
) -> SkippingConfig:
    cfg = SkippingConfig(
        run=RunConfig(dir=str(room / folder)),
        init=InitConfig(path=str(room / "base")),
        model=ModelConfig(layers="scan"),
        data=PairsConfig(
            path=str(room / "data.jsonl"), seq_len=32, batch_size=8, held_out_fraction=0.15
        ),
        method=method,
        lora=LoraConfig(rank=4, dropout=0.1, targets=("attn/q", "attn/v", "mlp/up", "mlp/down")),
        optim=OptimConfig(learning_rate=2e-2, warmup_steps=2, weight_decay=0.0),
        train=TrainConfig(steps=6, log_every=1, eval_every=3),
        checkpoint=CheckpointConfig(every_steps=3, keep_last=9),
        compute_dtype="float32",
    )
    return dataclasses.replace(cfg, **changes)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> pathlib.Path:
    """A base of four layers, questions whose answer the first letter decides, and a run."""
    room = tmp_path_factory.mktemp("layerskip")
    write_folder(room / "base", FOUR)
    rng = np.random.default_rng(0)
    with (room / "data.jsonl").open("w") as file:
        for i in range(80):
            word = "ab"[i % 2] + "".join(rng.choice(list("cdef"), 1 + i % 4))
            line = {"prompt": f"{word}{i}: ", "completion": ("yes", "never")[i % 2]}
            file.write(json.dumps(line) + "\n")
    recipe.run(config(room, "run"))
    return room


def rows(run: pathlib.Path, kind: str) -> list[dict]:
    return [row for row in read_metrics(run) if row["kind"] == kind]


def test_a_run_opens_as_the_model_of_its_first_layers(room):
    model = open_model.open_model(room / "run", dtype="float32")
    keep = (np.asarray(model.depth.routers["b"]) > 0).tolist()
    assert keep == [True, True, False, False] and model.depth.scope == "everywhere"
    built = recipe.build(config(room, "run"))
    batches = [{k: jnp.asarray(v) for k, v in b.items()} for _, b in built.held_out.iterate()]
    last = rows(room / "run", "eval")[-1]
    for layers, name in ((2, "loss"), (4, "full/loss")):
        short = dataclasses.replace(FOUR, num_layers=layers, layers="scan")
        params = {**model.params}
        params["blocks"] = jax.tree.map(lambda x, n=layers: x[:n], params["blocks"])
        step = make_eval_step(jax.jit(lambda p, b, short=short: decoder.forward(p, short, b)))
        assert perplexity(step, params, batches, 1.0)["loss"] == pytest.approx(last[name], rel=1e-4)
    assert last["depth/kept_layers"] == 2 and 0 < last["full/accuracy"] <= 1
    assert abs(last["loss"] - last["full/loss"]) > 1e-3
    first = rows(room / "run", "eval")[0]  # Both learn, the exit and the whole.
    assert last["loss"] < 0.8 * first["loss"] and last["full/loss"] < 0.8 * first["full/loss"]
    train = rows(room / "run", "train")
    # Of weights 0, 1, 3, 6 the layers {0, 2, 3} and {1, 3} in turn.
    assert [row["exits_enabled"] for row in train[:3]] == [1, 1, 1]
    assert [row["coefficient/nll"] for row in train[:2]] == pytest.approx([6 / 9, 6 / 7])


def test_it_goes_on_bit_for_bit(room, tmp_path):
    shutil.copytree(room / "run", tmp_path / "again")
    shutil.rmtree(manifest.step_folder(tmp_path / "again/checkpoints", 6))
    cfg = config(room, "run")
    recipe.run(dataclasses.replace(cfg, run=RunConfig(dir=str(tmp_path / "again"))))
    ends = [open_model.open_model(run, dtype="float32") for run in
            (room / "run", tmp_path / "again")]  # fmt: skip
    for a, b in zip(*(jax.tree.leaves((m.params, m.depth)) for m in ends), strict=True):
        np.testing.assert_array_equal(a, b)
    losses = [[row["loss"] for row in rows(run, "train")]
              for run in (room / "run", tmp_path / "again")]  # fmt: skip
    assert losses[0] == losses[1]


def test_without_dropout_and_exits_it_is_plain_fine_tuning(room):
    """The peer that runs all layers, from the same adapters, with the same dropout of theirs."""
    ends = []
    for method in (LayerSkip(kept=2, dropout=0.0, e_scale=0.0, curriculum="none"), AllLayers()):
        built = recipe.build(config(room, "none", method))
        state, phase = built.init_state(), built.phases[0]
        step, frozen = built.step_fn(phase), {"model": phase.frozen["model"].load()}
        for _, batch in built.batches(0, 2):
            state, metrics = step(state, frozen, batch)
        ends.append((jax.device_get(state.params["lora"]), float(metrics["nll"])))
    (ours, our_nll), (plain, nll) = ends
    assert our_nll == pytest.approx(nll, rel=1e-6)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_without_adapters_it_is_the_base_left_early(room):
    cfg = config(room, "none", lora=None, train=TrainConfig(steps=1))
    built = recipe.build(cfg)
    state = built.init_state()
    assert set(state.params) == {"routers"} and not built.phases[0].optimisers
    assert (np.asarray(state.params["routers"]["b"]) > 0).tolist() == [True, True, False, False]
    first = rows(room / "run", "eval")[0]  # Of adapters that have not learned yet.
    found = built.evaluate(state)
    for name in ("loss", "full/loss", "full/accuracy"):
        assert found[name] == pytest.approx(first[name], rel=1e-5)


def test_flops_count_the_exits(room):
    plain = recipe.build(config(room, "none", dataclasses.replace(METHOD, e_scale=0.0)))
    turns = recipe.build(config(room, "none"))
    more = turns.flops(turns.phases[0]) - plain.flops(plain.phases[0])
    # One exit a step, its product with the table forward and backward, for 8 x 32 tokens.
    assert more == 2 * 8 * 32 * 2 * FOUR.d_model * FOUR.vocab_size
    assert turns.phases[0].objective.captures == (2, 3)
    assert plain.phases[0].objective.captures == ()


def test_wrong_settings_end_before_anything_runs(room):
    for method, message in (
        (LayerSkip(kept=9, interval=2), "kept is 9; expected 1 to 4"),
        (LayerSkip(kept=2), "interval is 16, the model has 4 layers"),
    ):
        with pytest.raises(UserError, match=message):
            recipe.run(config(room, "none", method))
    assert not (room / "none").exists()
    for arg, message in (
        ("docstring", "did you mean 'docstrings'"),
        ("docstrings,skip=1", "expected a share from 0 to 0.97"),
        ("docstrings,kept=3", "expected skip=SHARE or seed=N"),
    ):
        with pytest.raises(UserError, match=message):
            smollm2.get_config(arg)
    cfg = smollm2.get_config("gsm_symbolic,skip=0.4,seed=2")
    assert isinstance(cfg.method, LayerSkip) and cfg.method.kept == 18 and cfg.data.seed == 2
