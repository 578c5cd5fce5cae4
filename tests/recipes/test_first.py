"""Training to skip layers: two stages, resumed in each, and the model that comes out."""

import dataclasses
import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import tiny_first
from support import REPO
from tiny_models import LLAMA, write_folder

from jaxreason.core.errors import UserError
from jaxreason.core.mesh import MeshConfig, make_mesh
from jaxreason.data.pairs import Conversation
from jaxreason.depth import first
from jaxreason.depth.decision import Decision
from jaxreason.depth.sets import RandomLayers, most_influential
from jaxreason.depth.skip_cost import skip_costs
from jaxreason.depth.unified import unified_set
from jaxreason.eval.perplexity import make_eval_step, perplexity
from jaxreason.main import main
from jaxreason.models import decoder
from jaxreason.models.hf import load_hf
from jaxreason.recipes import first as recipe
from jaxreason.recipes import open_model
from jaxreason.recipes.convert import convert
from jaxreason.recipes.teacher import TeacherConfig, open_teacher
from jaxreason.rollout import GREEDY, generate
from jaxreason.train import manifest
from jaxreason.train.log import read_metrics

TINY = f"--config={REPO}/tests/fixtures/tiny_first.py"
FOUR = dataclasses.replace(LLAMA, num_layers=4)


def arguments(room: pathlib.Path, arm: str, folder: str, *more: str) -> list[str]:
    return [
        f"{TINY}:{arm}", f"--config.run.dir={room / folder}", f"--config.init.path={room}/base",
        f"--config.data.path={room}/data.jsonl", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> pathlib.Path:
    """A base of four layers, questions whose answer the first letter decides, and a run."""
    room = tmp_path_factory.mktemp("first")
    write_folder(room / "base", FOUR)
    rng = np.random.default_rng(0)
    with (room / "data.jsonl").open("w") as file:
        for i in range(80):
            word = "ab"[i % 2] + "".join(rng.choice(list("cdef"), 1 + i % 4))
            line = {"prompt": f"{word}{i}: ", "completion": ("yes", "never")[i % 2]}
            file.write(json.dumps(line) + "\n")
    assert main(arguments(room, "first", "run", "--config.run.samples=2")) == 0
    return room


def config(room: pathlib.Path, arm: str = "first"):
    cfg = tiny_first.get_config(arm)
    return dataclasses.replace(
        cfg,
        init=dataclasses.replace(cfg.init, path=str(room / "base")),
        data=dataclasses.replace(cfg.data, path=str(room / "data.jsonl")),
    )


def rows(run: pathlib.Path, kind: str) -> list[dict]:
    return [row for row in read_metrics(run) if row["kind"] == kind]


def routers(run: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    depth = open_model.open_model(run, dtype="float32", step=step).depth
    return {name: np.asarray(value) for name, value in depth.routers.items()}


def test_each_stage_trains_its_own_group(room):
    before, middle, after = (routers(room / "run", step) for step in (3, 6, 12))
    for name in ("w", "b"):
        moved = np.abs(middle[name] - before[name]).reshape(4, -1).max(axis=1)
        assert moved[1:].min() > 1e-4 and moved[0] == 0  # Layer 0 always runs: no gradient.
        np.testing.assert_array_equal(after[name], middle[name])
    base = load_hf(room / "base", dtype="float32")
    at_6 = open_model.open_model(room / "run", dtype="float32", step=6).params
    for a, b in zip(jax.tree.leaves(at_6), jax.tree.leaves(base.params), strict=True):
        np.testing.assert_array_equal(a, b)  # Stage 1 has moved no adapter, and never the base.
    folder = manifest.step_folder(room / "run/checkpoints", 12)
    stored = {name.split("/")[1] for name in manifest.read_meta(folder)["leaves"] if "/" in name}
    assert stored == {"routers", "lora"}


def test_the_rows_tell_of_the_layers(room):
    train, held_out = rows(room / "run", "train"), rows(room / "run", "eval")
    # alpha drives the routers down, in stage 1 alone; its penalty is not stage 2's.
    assert train[5]["depth/p"] < train[0]["depth/p"] - 0.02
    assert "depth/penalty" in train[5] and "depth/penalty" not in train[6]
    np.testing.assert_allclose(train[0]["coefficient/keep"], 1.0)
    assert train[5]["learning_rate"] < train[2]["learning_rate"] == pytest.approx(3e-2)
    assert train[8]["learning_rate"] == pytest.approx(2e-2)
    for row in train + held_out:
        kept = [row[f"depth/keep_{layer:02d}"] for layer in range(4)]
        assert kept[0] == 1 and sum(kept) == pytest.approx(row["depth/kept_layers"], abs=1e-5)
    assert 1 < held_out[-1]["depth/kept_layers"] < 4
    # Adapters learn under the decisions.
    assert held_out[-1]["loss"] < 0.8 * held_out[1]["loss"]


def test_a_run_is_a_model_that_skips_as_it_was_trained(room):
    model = open_model.open_model(room / "run", dtype="float32")
    built = recipe.build(config(room))
    cfg = built.cfg.gating

    @jax.jit
    def forward(params, batch):
        wrapped = lambda wrap: decoder.forward(params, FOUR, batch, wrap=wrap)  # noqa: E731
        return first.forward(cfg, model.depth.routers, batch, wrapped, hard=True)

    batches = [{k: jnp.asarray(v) for k, v in b.items()} for _, b in built.held_out.iterate()]
    loss = perplexity(make_eval_step(forward), model.params, batches, 1.0)["loss"]
    assert loss == pytest.approx(rows(room / "run", "eval")[-1]["loss"], rel=1e-4)
    plain = make_eval_step(jax.jit(lambda p, b: decoder.forward(p, FOUR, b)))
    assert abs(perplexity(plain, model.params, batches, 1.0)["loss"] - loss) > 1e-3

    # Generation chooses the layers that the training forward chooses for the same prompts.
    prompts = built.pairs.prompts("held_out", 4)
    done = generate(model, prompts, GREEDY, max_new_tokens=3, ignore_eos=True)
    width = max(map(len, prompts)) + 1
    batch = {
        "tokens": np.array([p + [0] * (width - len(p)) for p in prompts], np.int32),
        "positions": np.tile(np.arange(width, dtype=np.int32), (len(prompts), 1)),
        "segment_ids": np.array([[1] * len(p) + [0] * (width - len(p)) for p in prompts]),
    }
    batch["prompt_mask"] = batch["segment_ids"].astype(np.float32)
    keep = np.asarray(forward(model.params, batch).depth.keep[:, :, 1])
    for row, completion in enumerate(done):
        assert completion.layers == np.flatnonzero(keep[:, row]).tolist()
    assert (room / "run/samples.txt").exists()


@pytest.mark.parametrize("step", [3, 9])
def test_either_stage_goes_on_bit_for_bit(room, tmp_path, step):
    shutil.copytree(room / "run", tmp_path / "again")
    for done in manifest.steps(tmp_path / "again/checkpoints"):
        if done > step:
            shutil.rmtree(manifest.step_folder(tmp_path / "again/checkpoints", done))
    assert main(arguments(room, "first", "again", f"--config.run.dir={tmp_path / 'again'}")) == 0
    straight, again = (
        open_model.open_model(run, dtype="float32") for run in (room / "run", tmp_path / "again")
    )
    for a, b in zip(
        *(jax.tree.leaves((m.params, m.depth)) for m in (straight, again)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    losses = [
        [row["loss"] for row in rows(run, "train")] for run in (room / "run", tmp_path / "again")
    ]
    assert losses[0] == losses[1]


def test_peers_take_the_same_path(room):
    assert main(arguments(room, "unified", "unified")) == 0
    model = open_model.open_model(room / "unified", dtype="float32")
    kept = unified_set(4, 3)
    row = rows(room / "unified", "eval")[-1]
    assert tuple(row[f"depth/keep_{layer:02d}"] == 1 for layer in range(4)) == kept
    assert row["loss"] < 0.8 * rows(room / "unified", "eval")[0]["loss"]
    own = generate(model, ["ac1: "], GREEDY, max_new_tokens=4, ignore_eos=True)[0]
    assert own.layers == [layer for layer in range(4) if kept[layer]]


def test_without_adapters_a_peer_is_its_base_under_a_set(room):
    assert main(arguments(room, "influence", "influence")) == 0
    model = open_model.open_model(room / "influence", dtype="float32")
    base = load_hf(room / "base", dtype="float32")
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(base.params), strict=True):
        np.testing.assert_array_equal(a, b)
    built = recipe.build(config(room, "influence"))
    cosine, count, influence = np.zeros(4), 0, {}
    for i in range(recipe.INFLUENCE_BATCHES):
        batch = built.train_data.batch(i)
        states = jax.jit(
            lambda b: decoder.forward(base.params, FOUR, b, capture=(0, 1, 2, 3, 4)).captured
        )(batch)
        real = batch["segment_ids"] > 0
        count += real.sum()
        for layer in range(4):
            a, b = (np.asarray(states[k])[real] for k in (layer, layer + 1))
            norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            cosine[layer] += ((a * b).sum(axis=1) / norms).sum()
        influence[i + 1] = 1 - cosine / count
    expected = most_influential(influence[2], 2, (False,) * 4)
    assert (np.asarray(model.depth.routers["b"]) > 0).tolist() == list(expected)
    assert model.depth.scope == "everywhere"
    # FiRST's routers can begin in that order, evenly spread about the first bias.
    cfg = config(room)
    method = dataclasses.replace(
        cfg.method, init_order="influence", init_bias=2.0, init_spread=0.5, init_std=0.0
    )
    state = recipe.build(dataclasses.replace(cfg, method=method)).init_state()
    first = np.asarray(state.params["routers"]["b"])
    np.testing.assert_allclose(np.sort(first), np.linspace(1.5, 2.5, 4), rtol=1e-6)
    np.testing.assert_array_equal(np.argsort(first), np.argsort(influence[4]))
    # Or in that of skip costs, behind the layers that run anyway.
    built = recipe.build(
        dataclasses.replace(cfg, method=dataclasses.replace(method, init_order="cost"))
    )
    by_cost = np.asarray(built.init_state().params["routers"]["b"])
    rows = [built.put(built.train_data.batch(i)) for i in range(recipe.COST_BATCHES)]
    run = lambda p, batch, wrap: decoder.forward(p, built.model, batch, wrap=wrap)  # noqa: E731
    costs = skip_costs(run, base.params, rows, (True, False, False, False))
    np.testing.assert_array_equal(np.argsort(by_cost), np.argsort(costs))


def test_wrong_configs_end_before_anything_runs(room, tmp_path, capsys):
    for change, message in (
        (["--config.lora=None"], "only routers are trained, and train.steps is 12; set it to 6"),
        (["--config.router_steps=12"], "leaves no update for the adapters"),
        (["--config.method.decision.rule=top", "--config.method.decision.kept=9"], "kept is 9"),
        (["--config.method.decision.rule=top", "--config.method.scope=everywhere"], "everywhere"),
        (["--config.method.alpha=-1"], "alpha is -1"),
        (
            [
                "--config.method.decision.rule=top",
                "--config.method.decision.kept=3",
                "--config.method.gate=token",
                "--config.method.form=straight_through",
            ],
            "set gate to sequence",
        ),
    ):
        capsys.readouterr()
        folder = tmp_path / "none"
        assert main(arguments(room, "first", "none", f"--config.run.dir={folder}", *change)) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err
        assert not folder.exists()
    change = ["--config.method.kept=0", f"--config.run.dir={folder}"]
    assert main(arguments(room, "influence", "none", *change)) == 2
    assert "kept is 0" in capsys.readouterr().err and not folder.exists()
    with pytest.raises(UserError, match="seed is -1"):
        RandomLayers(kept=2, seed=-1).validate()
    with pytest.raises(UserError, match="nothing is trained"):
        dataclasses.replace(
            tiny_first.get_config("influence"), train=tiny_first.TrainConfig(steps=2)
        ).validate()
    assert Decision().always(4) == (True, False, False, True)


def test_what_would_run_all_layers_refuses_a_run_that_chooses_them(room, tmp_path):
    run = str(room / "run")
    for format in ("hf", "orbax", "peft"):
        with pytest.raises(UserError, match="chooses its layers by prompt"):
            convert(run, tmp_path / format, format=format)
        assert not (tmp_path / format).exists()
    cfg = config(room)
    with pytest.raises(UserError, match="training from it would run them all"):
        recipe.build(dataclasses.replace(cfg, init=dataclasses.replace(cfg.init, path=run)))
    with pytest.raises(UserError, match="a teacher would run them all"):
        open_teacher(
            TeacherConfig(path=run), seq_len=16, dtype="float32", mesh=make_mesh(MeshConfig())
        )


def test_conversations_of_several_replies_must_learn_the_last(room):
    say = lambda role: {"role": role, "content": "a"}  # noqa: E731
    turns = Conversation(messages=(say("user"), say("assistant")) * 2, name="talk.jsonl:3")
    pairs = types.SimpleNamespace(items={"train": [turns], "held_out": []})
    cfg = config(room)
    with pytest.raises(UserError, match="talk.jsonl:3 has 2 replies.*learned_turns=last"):
        recipe._check_turns(cfg, pairs)
    last = dataclasses.replace(cfg.data, learned_turns="last")
    recipe._check_turns(dataclasses.replace(cfg, data=last), pairs)
    one = dataclasses.replace(turns, messages=turns.messages[:2])
    recipe._check_turns(cfg, types.SimpleNamespace(items={"train": [one]}))
