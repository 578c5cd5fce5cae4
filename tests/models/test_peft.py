"""Adapters against peft: its files read and written, its logits, and what is refused."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from goldens import FOLDER, open_family
from support import REPO
from tiny_models import write_folder

from benchmarks import parity
from jaxreason import convert
from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.main import main
from jaxreason.models import decoder, safetensors_io
from jaxreason.models.hf import load_hf
from jaxreason.models.peft import load_peft, save_peft
from jaxreason.nn import lora
from jaxreason.nn.lora import LoraConfig
from jaxreason.recipes.open_model import open_model

CASES = sorted(folder.name for folder in (FOLDER / "peft").iterdir())
opened = functools.cache(open_family)


@pytest.fixture(scope="module", autouse=True)
def release():
    yield
    opened.cache_clear()


def logits(case: str, adapters, cfg: LoraConfig) -> np.ndarray:
    """Of the 16 tokens that the references keep."""
    model, ref = opened(case)
    rows = [[row] for row in parity.kept(ref)]
    adapted = dataclasses.replace(model, params=lora.attach(model.params, adapters, cfg))
    return parity.forward(adapted, parity.batch_of(rows, ref["tokens"].shape[1]))["logits"][:16]


def tensors(folder) -> dict[str, np.ndarray]:
    return safetensors_io.open_file(folder / "adapter_model.safetensors")


def random(case: str, cfg: LoraConfig):
    """Adapters of which no leaf is zero."""
    specs = lora.specs(decoder.specs(opened(case)[0].config), cfg)
    some = jax.tree.map(lambda s: dataclasses.replace(s, init=P.normal(0.2)), specs)
    return P.initialise(some, jax.random.key(4))


@pytest.mark.parametrize("case", CASES)
def test_logits_of_peft(case):
    adapters, cfg = load_peft(FOLDER / "peft" / case, opened(case)[0])
    with np.load(FOLDER / "peft" / case / "reference.npz") as arrays:
        want = arrays["logits"]
    assert np.abs(want - opened(case)[1]["logits"][:16]).max() > 1
    np.testing.assert_allclose(logits(case, adapters, cfg), want, atol=1e-4)
    assert (cfg.rank_stabilised, cfg.dropout) == (case == "qwen2", 0.1)


@pytest.mark.parametrize("case", CASES)
def test_files_of_peft_there_and_back(case, tmp_path):
    """Every tensor bit for bit; every setting that peft wrote and we write is the same."""
    source, model = FOLDER / "peft" / case, opened(case)[0]
    save_peft(*load_peft(source, model), model, tmp_path / "out", base=case)
    ours, theirs = tensors(tmp_path / "out"), tensors(source)
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    read = lambda folder: json.loads((folder / "adapter_config.json").read_text())  # noqa: E731
    written, original = read(tmp_path / "out"), read(source)
    original["target_modules"].sort()
    assert written == {name: original[name] for name in written}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize(
    "targets",
    [("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up"), ("attn/o", "attn/k"), ("attn/v",)],
)
def test_a_fused_module_gets_adapters_side_by_side(targets, rank_stabilised, tmp_path):
    """GPT-NeoX has one matrix for queries, keys and values; ours have an A each."""
    cfg = LoraConfig(rank=2, alpha=3.0, targets=targets, rank_stabilised=rank_stabilised)
    adapters, model = random("gpt_neox", cfg), opened("gpt_neox")[0]
    save_peft(adapters, cfg, model, tmp_path / "out")
    again, read = load_peft(tmp_path / "out", model)
    fused = len(set(targets) & {"attn/q", "attn/k", "attn/v"})
    assert read.rank == 2 * fused and np.isclose(read.scale, cfg.scale)
    shapes = {name: value.shape for name, value in tensors(tmp_path / "out").items()}
    assert any("query_key_value.lora_B" in name for name in shapes)
    ours = logits("gpt_neox", again, read)
    np.testing.assert_allclose(ours, logits("gpt_neox", adapters, cfg), atol=1e-4)


def edited(tmp_path, case="llama", config=(), change=None):
    """A copy of peft's folder with other settings or tensors."""
    folder = tmp_path / "edited"
    shutil.copytree(FOLDER / "peft" / case, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    if change:
        values = change({name: np.array(value) for name, value in tensors(folder).items()})
        lazy = [(name, value.shape, lambda value=value: value) for name, value in values.items()]
        safetensors_io.write_folder(folder, lazy, "float32")
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    return folder


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        ({"use_dora": True}, None, "use_dora is true, which is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, None, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 4}}, None, "alpha_pattern is"),
        ({"bias": "all"}, None, 'bias is "all"'),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
        ({"layers_to_transform": [1]}, None, "layers_to_transform is [1]"),
        ({"fan_in_fan_out": True}, None, "fan_in_fan_out"),
        ({"some_new_method": {"x": 1}}, None, "some_new_method"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, None, "peft_type is 'IA3'; expected 'LORA'"),
        ({"r": 0}, None, "r is '0'"),
        ({"r": 4}, None, "has shape [3, 24], this base and rank 4 make it [4, 24]"),
        ({"lora_alpha": "8"}, None, "lora_alpha is '8'"),
        ({"lora_dropout": 1.5}, None, "lora_dropout is '1.5'"),
        ({"target_modules": ["q_proj", "wq"]}, None, "target_modules names 'wq'"),
        ({}, lambda t: t | {Q0: t[Q0][:, :-1]}, "expected the base that it was trained on"),
        ({}, lambda t: {n: v for n, v in t.items() if ".layers.0." not in n}, "layers.0"),
        ({}, lambda t: {n: v for n, v in t.items() if n != Q0}, "q_proj.lora_A.weight is missing"),
        ({}, lambda t: t | {Q0.replace("rs.0", "rs.7"): t[Q0]}, "layers.7.self_attn.q_proj.lora_A"),
        ({}, lambda t: t | {"base_model.model.lm_head.lora_A.weight": t[Q0]}, "lm_head"),
        ({}, lambda _: {}, "holds no tensors"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_refused(config, change, said, tmp_path):
    folder = edited(tmp_path, config=config, change=change)
    with pytest.raises(UserError) as error:
        load_peft(folder, opened("llama")[0])
    assert said in str(error.value) and "\n" not in str(error.value), error.value


def test_another_base_is_refused(tmp_path):
    for case, said in (("gpt_neox", "is no adapter of a linear layer"), ("qwen2", "has shape")):
        with pytest.raises(UserError, match=said):
            load_peft(FOLDER / "peft" / case, opened("llama")[0])
    with pytest.raises(UserError, match="no local folder"):
        load_peft(tmp_path / "nothing", opened("llama")[0])
    folder = edited(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="a pickle"):
        load_peft(folder, opened("llama")[0])


def fails(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert convert.main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_the_command_merges(tmp_path, capsys):
    base, adapter = FOLDER / "hf" / "gpt_neox", FOLDER / "peft" / "gpt_neox"
    for form in ("hf", "orbax"):
        to = f"--to={tmp_path}/{form}"
        assert convert.main([f"--from={base}", f"--lora={adapter}", to, f"--format={form}"]) == 0
    model, ref = opened("gpt_neox")
    want = lora.merge(model.params, *load_peft(adapter, model))
    merged = load_hf(tmp_path / "hf", dtype="float32")
    for a, b in zip(jax.tree.leaves(merged.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(open_model(tmp_path / "orbax").params), jax.tree.leaves(want)):
        np.testing.assert_array_equal(a, b)
    rows = parity.batch_of([[row] for row in parity.kept(ref)], ref["tokens"].shape[1])
    with np.load(adapter / "reference.npz") as arrays:
        got = parity.forward(merged, rows, "float32")["logits"][:16]
        np.testing.assert_allclose(got, arrays["logits"], atol=1e-4)
    for argv, said in (
        (["--lora=" + str(FOLDER / "peft/llama"), "--format=hf"], "is no adapter"),
        ([f"--lora={adapter}", "--format=peft"], "--lora is given with --format=peft"),
        (["--format=peft"], "has no adapters"),
    ):
        assert said in fails(capsys, f"--from={base}", f"--to={tmp_path}/no", *argv)
        assert not (tmp_path / "no").exists()
    line = fails(capsys, f"--from={tmp_path}/none", f"--to={tmp_path}/no", "--format=peft")
    assert f"{tmp_path}/none does not exist" in line and "no adapters" not in line


def test_the_command_writes_a_run_s_adapters(tmp_path, monkeypatch, capsys):
    """Merged from peft's folder, they give the run itself as a model, bit for bit."""
    monkeypatch.setenv("JAXREASON_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "base")
    lines = [json.dumps({"prompt": f"{i} and ", "completion": "ab"[i % 2]}) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    settings = {
        "run.dir": tmp_path / "run", "init.path": tmp_path / "base", "train.steps": 1,
        "data.path": tmp_path / "data.jsonl", "optim.warmup_steps": 0, "model.layers": "scan",
    }  # fmt: skip
    tiny = f"--config={REPO}/tests/fixtures/tiny_finetune.py"
    assert main([tiny, *(f"--config.{name}={value}" for name, value in settings.items())]) == 0
    at = {name: str(tmp_path / name) for name in ("run", "base", "peft", "ours", "theirs")}
    for argv in (
        [f"--from={at['run']}", f"--to={at['peft']}", "--format=peft"],
        [f"--from={at['run']}", f"--to={at['ours']}", "--format=hf"],
        [f"--from={at['base']}", f"--lora={at['peft']}", f"--to={at['theirs']}", "--format=hf"],
    ):
        assert convert.main(argv) == 0
    written = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["r"]) == (at["base"], 6)
    models = [load_hf(at[name], dtype="float32").params for name in ("ours", "theirs", "base")]
    for ours, theirs in zip(*map(jax.tree.leaves, models[:2]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, models[1:]), strict=True))
    assert "no complete checkpoint of step 7" in fails(
        capsys, f"--from={at['run']}", "--step=7", f"--to={tmp_path}/no", "--format=peft"
    )
