"""Fine-tuning: what is learned, what is kept, what a run's folder is good for afterwards."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest
from fixtures import tiny_finetune
from support import REPO, environment, run_python, tail
from tiny_models import LLAMA, params, write_folder, write_gguf

from jaxreason.core.errors import UserError
from jaxreason.data import Example, Examples
from jaxreason.eval.perplexity import make_eval_step, perplexity
from jaxreason.main import main
from jaxreason.models import decoder
from jaxreason.recipes import finetune, open_model
from jaxreason.recipes.base import identity
from jaxreason.recipes.convert import convert
from jaxreason.rollout import GREEDY, generate
from jaxreason.train import manifest
from jaxreason.train.log import read_metrics

TINY = f"--config={REPO}/tests/fixtures/tiny_finetune.py"
FULL_STEPS = "--config.train.steps=4"


def write_examples(path: pathlib.Path) -> None:
    """Questions with one of two answers, which the first letter decides."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(120):
            word = "ab"[i % 2] + "".join(rng.choice(list("cdef"), 1 + i % 4))
            line = {"prompt": f"{word}{i}: ", "completion": ("yes", "never")[i % 2]}
            file.write(json.dumps(line) + "\n")


def arguments(room: pathlib.Path, arm: str, folder: str, *more: str) -> list[str]:
    return [
        f"{TINY}:{arm}", f"--config.run.dir={room / folder}", f"--config.init.path={room}/base",
        f"--config.data.path={room}/data.jsonl", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> pathlib.Path:
    """A base, examples, and the finished runs `lora` (20 steps) and `full` (4)."""
    room = tmp_path_factory.mktemp("finetune")
    write_folder(room / "base")
    write_examples(room / "data.jsonl")
    assert main(arguments(room, "lora", "lora", "--config.run.samples=2")) == 0
    assert main(arguments(room, "full", "full", FULL_STEPS)) == 0
    return room


def config(room: pathlib.Path, arm: str = "lora", **data) -> finetune.FinetuneConfig:
    cfg = tiny_finetune.get_config(arm)
    return dataclasses.replace(
        cfg,
        init=dataclasses.replace(cfg.init, path=str(room / "base")),
        data=dataclasses.replace(cfg.data, path=str(room / "data.jsonl"), **data),
    )


def leaves(run: pathlib.Path, step: int) -> dict:
    return manifest.read_meta(manifest.step_folder(run / "checkpoints", step))["leaves"]


def fails(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    return err


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_the_loss_goes_down_and_below_the_base_s(arm, room):
    evals = [row["loss"] for row in read_metrics(room / arm) if row["kind"] == "eval"]
    model = open_model.open_model(room / "base", dtype="float32")
    built = finetune.build(config(room))
    step = jax.jit(make_eval_step(lambda p, b: decoder.forward(p, LLAMA, b)))
    batches = [batch for _, batch in built.held_out.iterate()]
    untouched = perplexity(step, model.params, batches, 1.0)["loss"]
    assert evals[0] == pytest.approx(untouched, rel=1e-5)
    assert evals[-1] < (0.15 if arm == "lora" else 0.6) * untouched
    if arm == "lora":  # A coin would give half of the 18 held-out answers.
        tuned = open_model.open_model(room / "lora", dtype="float32")
        items: list[Any] = built.pairs.items["held_out"]
        replies = generate(tuned, [item.prompt for item in items], GREEDY, max_new_tokens=8)
        right = sum(r.text == item.completion for r, item in zip(replies, items, strict=True))
        assert right >= 16 and len(items) == 18
        samples = (room / "lora/samples.txt").read_text()
        assert items[0].prompt in samples and "<svg" in (room / "lora/report.html").read_text()


def test_a_checkpoint_holds_no_base_weights(room):
    """Only adapters and their moments; every shape has the rank in it, the base has none."""
    stored = leaves(room / "lora", 20)
    names = {name.split("/")[1] for name in stored if name.startswith(("params/", "opt_state/"))}
    assert names == {"lora"}
    arrays = [leaf["shape"] for leaf in stored.values() if leaf["shape"]]
    assert len(arrays) == 3 * 14 and all(6 in shape for shape in arrays)
    facts = json.loads((room / "lora/facts.json").read_text())
    assert facts["params_trained"] == sum(map(math.prod, arrays)) // 3 < facts["params"] // 4
    assert (
        facts["base_sha256"]
        == json.loads((room / "lora/config.json").read_text())["base"]["sha256"]
    )
    assert (facts["train_examples"], facts["held_out_examples"]) == (102, 18)
    assert {name for name in leaves(room / "full", 4) if name.startswith("params/model/")}


def test_a_run_s_folder_is_a_model(room, tmp_path):
    """Its loss is the run's own; converted to a Hugging Face folder it is the same model."""
    tuned = open_model.open_model(room / "lora", dtype="float32")
    assert (tuned.family, tuned.eos_ids, tuned.name) == ("llama", (2, 0), "lora")
    assert tuned.chat_template and tuned.source["base"] == f"{room}/base"
    built = finetune.build(config(room))
    batches = [batch for _, batch in built.held_out.iterate()]
    step = jax.jit(make_eval_step(lambda p, b: decoder.forward(p, LLAMA, b)))
    got = perplexity(step, tuned.params, batches, 1.0)["loss"]
    last = [row["loss"] for row in read_metrics(room / "lora") if row["kind"] == "eval"][-1]
    assert got == pytest.approx(last, rel=1e-4)
    earlier = open_model.open_model(room / "lora", dtype="float32", step=10)
    assert perplexity(step, earlier.params, batches, 1.0)["loss"] > got
    convert(str(room / "lora"), tmp_path / "hf", format="hf")
    again = open_model.open_model(tmp_path / "hf", dtype="float32")
    for one, two in zip(*map(jax.tree.leaves, (tuned.params, again.params)), strict=True):
        assert np.array_equal(one, two)
    half = open_model.open_model(room / "lora", param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}


def total_and_grads(built: finetune.Built, split: str, steps: range, adapters):
    """The sum of the losses of all completions of some batches, and its gradient."""
    objective, forward = built.phases[0].objective, built.phases[0].forward
    base = built.phases[0].frozen["model"].load()
    assert forward is not None
    data = built.train_data if split == "train" else built.held_out

    def loss(adapters, batch):
        outputs = forward({"model": base, "lora": adapters}, batch)
        return objective.terms(outputs, {}, batch, None, None, 0)[0]["nll"]

    grad = jax.jit(jax.value_and_grad(loss))
    found = [grad(adapters, built.put(data.batch(step))) for step in steps]
    return jax.tree.map(lambda *parts: np.sum(parts, axis=0), *found)


def test_packed_rows_give_what_separate_examples_give(room):
    key = jax.random.key(1)
    results = []
    for packing in ("none", "best_fit"):
        built = finetune.build(config(room, packing=packing, held_out_fraction=0.3))
        adapters = built.init_state().params["lora"]  # With b away from 0, so that a has gradients.
        adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), adapters)
        batches = built.held_out.num_batches
        results.append(total_and_grads(built, "held_out", range(batches), adapters))
        results[-1] = (batches, *results[-1])
    (separate, loss, grads), (packed, packed_loss, packed_grads) = results
    assert packed < separate and packed_loss == pytest.approx(loss, rel=1e-5)
    for one, two in zip(*map(jax.tree.leaves, (grads, packed_grads)), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-4 * np.abs(one).max())


def test_accumulation_is_the_big_batch_with_dropout_on(room):
    states = []
    for accumulate in (1, 4):
        cfg = config(room)
        assert cfg.lora is not None
        cfg = dataclasses.replace(
            cfg,
            train=dataclasses.replace(cfg.train, accumulate=accumulate),
            lora=dataclasses.replace(cfg.lora, dropout=0.5),
            optim=dataclasses.replace(cfg.optim, name="sgd", learning_rate=0.1, warmup_steps=0),
        )
        built = finetune.build(cfg)
        phase, state = built.phases[0], built.init_state()
        start = jax.tree.map(np.asarray, state.params["lora"])
        frozen = {name: model.load() for name, model in phase.frozen.items()}
        step = built.step_fn(phase)
        for _, batch in built.batches(0, 2):
            state, metrics = step(state, frozen, batch)
        states.append((jax.tree.map(np.asarray, state.params["lora"]), float(metrics["nll"])))
    (one, loss), (four, loss_four) = states
    assert loss_four == pytest.approx(loss, rel=1e-5)
    for a, b, c in zip(*map(jax.tree.leaves, (one, four, start)), strict=True):
        np.testing.assert_allclose(b - c, a - c, rtol=1e-3, atol=1e-3 * np.abs(a - c).max())
    undropped = built.evaluate(state)["loss"]
    assert abs(undropped - loss) > 1e-3  # So the masks did something.


def start_run(room: pathlib.Path, folder: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxreason.main", *arguments(room, "lora", folder)]
    command += ["--config.checkpoint.every_steps=2"]
    env = environment(JAXREASON_CPU_FLAGS="0", JAX_COMPILATION_CACHE_DIR=str(room / "xla"))
    return subprocess.Popen(
        command, cwd=REPO, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_a_killed_run_goes_on_bit_for_bit(room):
    """`kill -9` after a checkpoint; the end is that of the straight run, arrays and rows."""
    process = start_run(room, "killed")
    checkpoints, deadline = room / "killed/checkpoints", time.monotonic() + 300
    while not any(manifest.is_complete(f) for f in map(manifest.absolute, checkpoints.glob("0*"))):
        assert process.poll() is None and time.monotonic() < deadline, tail(
            process.communicate()[0]
        )
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    begun = max(int(folder.name) for folder in checkpoints.glob("0*"))
    assert begun < 20
    again = start_run(room, "killed")
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0 and "goes on after step" in output, tail(output)
    names = [m for m in leaves(room / "killed", 20)]
    assert names == [m for m in leaves(room / "lora", 20)]
    for one, two in zip(*(stored(room / name) for name in ("lora", "killed")), strict=True):
        assert np.array_equal(one, two)
    rows = [
        [(row["step"], row["loss"]) for row in read_metrics(room / name) if "loss" in row]
        for name in ("lora", "killed")
    ]
    assert rows[0] == rows[1]


def stored(run: pathlib.Path) -> list[np.ndarray]:
    """All arrays of the last checkpoint."""
    from jaxreason.train.checkpoint import CheckpointConfig, Checkpointer

    cfg = config(run.parent)
    built = finetune.build(cfg)
    saver = Checkpointer(
        run / "checkpoints", CheckpointConfig(), config_json="", version="",
        model_fingerprint=built.fingerprint,
    )  # fmt: skip
    restored = saver.latest(built.abstract_state)
    assert restored is not None and restored.step == 20
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored.state)]


def test_any_byte_of_the_base_is_part_of_its_identity(tmp_path):
    rng = np.random.default_rng(0)
    content = bytearray(rng.bytes(9 << 20))
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    seen = {identity(tmp_path)}
    for at in (0, len(content) - 1, *rng.integers(0, len(content), 6).tolist()):
        content[at] ^= 1
        file.write_bytes(content)
        seen.add(identity(tmp_path))
    assert len(seen) == 9


def test_the_base_may_move_but_not_change(room, tmp_path, capsys):
    """The same weights elsewhere are the same base; others are refused, in a run and opened."""
    copy = tmp_path / "room"
    copy.mkdir()
    shutil.copytree(room / "base", copy / "moved")
    shutil.copytree(room / "lora", copy / "lora")
    own = [
        *arguments(room, "lora", "lora"),
        f"--config.run.dir={copy}/lora",
        "--config.run.samples=2",
    ]
    assert main([*own, f"--config.init.path={copy}/moved"]) == 0
    before = sorted((copy / "lora").rglob("*"))
    (copy / "other").mkdir()
    other = dataclasses.replace(LLAMA, init_std=0.19)
    write_folder(copy / "other/base", other)
    line = fails(capsys, *own, f"--config.init.path={copy}/other/base")
    assert "is another model than the run's base" in line
    shutil.rmtree(copy / "moved")
    assert "moved" in fails(capsys, *own, f"--config.init.path={copy}/moved")
    assert sorted((copy / "lora").rglob("*")) == before
    with pytest.raises(UserError, match="the base of the run .* does not open: .*moved"):
        open_model.open_model(copy / "lora")
    shutil.copytree(copy / "other/base", copy / "moved")
    with pytest.raises(UserError, match="was another model than .*moved holds now"):
        open_model.open_model(copy / "lora")


def test_all_weights_need_no_base_afterwards(room, tmp_path, capsys):
    shutil.copytree(room / "full", tmp_path / "full")
    shutil.copytree(room / "base", tmp_path / "base")
    shutil.copy(room / "data.jsonl", tmp_path)
    gone = [*arguments(room, "full", "full", FULL_STEPS), f"--config.run.dir={tmp_path}/full"]
    assert main(gone) == 0
    one = open_model.open_model(tmp_path / "full", dtype="float32")
    base = params(LLAMA)
    moved = [
        float(np.abs(x - y).max())
        for x, y in zip(*map(jax.tree.leaves, (one.params, base)), strict=True)
    ]
    assert min(moved) > 0 and (one.family, one.eos_ids) == ("llama", (2, 0))
    assert "init.path" in fails(capsys, *gone, f"--config.init.path={tmp_path}/base")


def test_examples_from_code_and_a_config_that_replays(room, tmp_path, capsys):
    items = tuple(Example(f"p{i}: ", "yes" if i % 2 else "no", f"e{i}") for i in range(40))
    items += (Example("p" * 40, "never"),)
    cfg = tiny_finetune.get_config("lora")
    cfg = dataclasses.replace(
        cfg,
        run=dataclasses.replace(cfg.run, dir=str(tmp_path / "one")),
        init=dataclasses.replace(cfg.init, path=str(room / "lora")),  # A tuned model tuned again.
        data=dataclasses.replace(
            cfg.data, source=Examples(examples=items), batch_size=4, too_long="drop"
        ),
        train=dataclasses.replace(cfg.train, steps=2, eval_every=0),
    )
    direct = finetune.build(
        dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, source=Examples())), items=items
    )
    finetune.run(cfg)
    note = "1 of 41 examples are longer than data.seq_len=32: 1 left out, 0 cut"
    assert note in capsys.readouterr().out
    saved = json.loads((tmp_path / "one/config.json").read_text())
    assert len(saved["data"]["source"]["examples"]) == 41 and saved["init"]["step"] == 20
    facts = json.loads((tmp_path / "one/facts.json").read_text())
    assert facts["corpus_sha256"] == direct.pairs.sha256
    os.chdir(REPO)
    assert main([f"--config={tmp_path}/one/config.json", f"--config.run.dir={tmp_path}/two"]) == 0
    rows = [
        [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row]
        for name in ("one", "two")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    assert open_model.open_model(tmp_path / "one").name == "one"


@pytest.mark.parametrize("kind", ["gguf", "orbax"])
def test_other_kinds_of_bases(kind, room, tmp_path):
    """What is open at the end has the base's tokenizer, template and end tokens."""
    base = tmp_path / ("base.gguf" if kind == "gguf" else "base")
    if kind == "gguf":
        write_gguf(base)
    else:
        convert(str(room / "base"), base, format="orbax")
    short = ("--config.train.steps=1", "--config.train.eval_every=0", f"--config.init.path={base}")
    assert main([*arguments(room, "lora", "x", *short), f"--config.run.dir={tmp_path}/run"]) == 0
    ours, theirs = (open_model.open_model(p, dtype="float32") for p in (tmp_path / "run", base))
    for name in ("chat_template", "eos_ids", "bos_id", "family", "context"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.chat_template and ours.tokenizer.fingerprint == theirs.tokenizer.fingerprint
    same = [
        np.array_equal(one, two)
        for one, two in zip(*map(jax.tree.leaves, (ours.params, theirs.params)), strict=True)
    ]
    assert same.count(False) == 7  # The adapted weights, stacked over layers.


def test_a_mesh_of_four_devices_equals_one(tmp_path):
    """Dropout on, the base loaded in shards, adapters cut like their weights."""
    out = run_python(REPO / "tests/fixtures/finetune_meshes.py", str(tmp_path), devices=4)
    one, other = map(json.loads, out.splitlines())
    assert len(one[0]) == 4 and len(one[1]) == 14
    for got, expected in zip(other, one, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
