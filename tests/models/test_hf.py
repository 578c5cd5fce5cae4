"""Hugging Face folders: configs of both versions, names, streaming, tokenizers, exports."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_models
import tokenizers
from goldens import FOLDER
from support import run_python

from jaxreason.core.errors import UserError
from jaxreason.core.text import ByteTokenizer, train_sentencepiece
from jaxreason.models import own_text, safetensors_io
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.hf import load_hf, save_hf
from jaxreason.models.hf_config import family_of, from_hf, plain, to_hf
from jaxreason.models.model import Model
from jaxreason.nn.moe import Moe
from jaxreason.nn.rope import LinearScaling, Llama3Scaling

LLAMA = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
NEOX = LLAMA | {"model_type": "gpt_neox"}
OPT = {**LLAMA, "model_type": "opt", "ffn_dim": 64}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2}
SCALED = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
EXPECTED = Llama3Scaling(factor=4.0, original_context=64)

READ = [
    (LLAMA, {"norm_eps": 1e-6, "rope_base": 1e4, "tie_embeddings": False, "kv_heads": 4}),
    (
        LLAMA | {"rope_theta": 5e5, "rope_scaling": SCALED},
        {"rope_base": 5e5, "rope_scaling": EXPECTED},
    ),
    (
        LLAMA | {"rope_parameters": SCALED | {"rope_theta": 5e5}},
        {"rope_base": 5e5, "rope_scaling": EXPECTED},
    ),
    (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": LinearScaling(factor=2.0)},
    ),
    (LLAMA | {"attention_bias": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": False}),
    (LLAMA | {"mlp_bias": True}, {"qkv_bias": False, "mlp_bias": True}),
    (LLAMA | {"sliding_window": 7}, {"window": None}),  # transformers' Llama has none
    (LLAMA | {"model_type": "mistral", "num_key_value_heads": 2}, {"window": 4096}),
    (
        LLAMA | {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 1},
        {"window": None, "kv_heads": 1},
    ),
    (QWEN2, {"qkv_bias": True, "out_bias": False, "window": None}),
    (
        QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
        {"window": 5, "window_from": 2},
    ),
    (
        QWEN2 | {
            "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        },
        {"window": 5, "window_from": 2},
    ),
    (QWEN2 | {"use_sliding_window": True, "max_window_layers": 3}, {"window": None}),
    (
        QWEN2 | {"model_type": "qwen3", "head_dim": None},
        {"qk_norm": True, "head_width": 128, "qkv_bias": False},
    ),
    (
        NEOX,
        {"rotary_fraction": 0.25, "parallel_residual": True, "mlp": "gelu", "norm": "layer",
         "qkv_bias": True, "mlp_bias": True},
    ),
    (
        NEOX | {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 7.0},
                "hidden_act": "gelu_fast", "attention_bias": False},
        {"rotary_fraction": 0.5, "rope_base": 7.0, "mlp": "gelu_tanh", "out_bias": False},
    ),
    (
        NEOX | {"rotary_pct": 1.0, "rotary_emb_base": 9, "use_parallel_residual": False},
        {"rotary_fraction": 1.0, "rope_base": 9.0, "parallel_residual": False},
    ),
    (OPT, {"positions": "learned", "max_positions": 2048, "tie_embeddings": True, "mlp": "relu"}),
    (
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        {"norm_place": "post", "final_norm": False, "embed_width": 16},
    ),
    (OPT | {"_remove_final_layer_norm": True}, {"norm_place": "pre", "final_norm": False}),
    (
        LLAMA | {"model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 2,
                 "clip_qkv": 8.0},
        {"moe": Moe(num_experts=6, top_k=2), "qk_norm_scope": "all", "clip_qkv": 8.0,
         "norm_eps": 1e-5},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "fields"), READ)
def test_a_config_is_read(config, fields):
    cfg, family = from_hf(config)
    assert family == config["model_type"]
    assert {name: getattr(cfg, name) for name in fields} == fields
    # What is written for it says the same.
    again, _ = from_hf(json.loads(json.dumps(to_hf(cfg, family))))
    assert plain(again) == plain(cfg)


REFUSED = [
    ({"model_type": "gemma2"}, "model_type is 'gemma2'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
    ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"quantization_config": {"bits": 4}}, "quantised"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"num_key_value_heads": 3}, "num_kv_heads"),
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"model_type": "olmoe", "sliding_window": 4}, "sliding_window"),
    ({"model_type": "olmoe", "num_experts": 2, "num_experts_per_tok": 3}, "top_k"),
    ({"model_type": "opt", "ffn_dim": 8, "layer_norm_elementwise_affine": False}, "elementwise"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
      "layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "layer_types"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_a_config_is_refused_in_one_line(change, said):
    with pytest.raises(UserError, match=said) as error:
        from_hf(LLAMA | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("cfg", "family"),
    [
        (ModelConfig(vocab_size=64), "llama"),
        (ModelConfig(vocab_size=64, d_model=60, num_heads=8, head_dim=16), "mistral"),
        (ModelConfig(vocab_size=64, window=8), "mistral"),
        (ModelConfig(vocab_size=64, qkv_bias=True), "qwen2"),
        (ModelConfig(vocab_size=64, qk_norm=True, head_dim=32), "qwen3"),
    ],
)
def test_a_model_trained_here_has_a_family(cfg, family):
    assert family_of(cfg) == family


def test_a_model_that_no_family_has_is_refused():
    with pytest.raises(UserError, match=r"model.logit_soft_cap is 5.0, which no llama"):
        family_of(ModelConfig(vocab_size=64, logit_soft_cap=5.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_are_those_of_the_reference_package(tmp_path, dtype):
    model = tiny_models.write_folder(tmp_path / "ours")
    save_hf(model, tmp_path / "out", dtype=dtype, shard_bytes=60_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    theirs = {k: v for path in shards for k, v in safetensors.numpy.load_file(path).items()}
    ours = safetensors_io.open_folder(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(ours[name], value)
    again = load_hf(tmp_path / "out", dtype="float32")
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params)):
        np.testing.assert_array_equal(a, b.astype(dtype).astype(jnp.float32))
    held = load_hf(tmp_path / "out", param_dtype="bfloat16").params
    assert {leaf.dtype for leaf in jax.tree.leaves(held)} == {jnp.dtype("bfloat16")}


def test_what_belongs_to_a_model_travels(tmp_path):
    model = tiny_models.write_folder(tmp_path / "a")
    opened = load_hf(tmp_path / "a", dtype="float32")
    assert opened.chat_template == tiny_models.TEMPLATE and opened.eos_ids == (2, 0)
    assert (opened.bos_id, opened.context, opened.family) == (None, 64, "llama")
    assert opened.tokenizer.encode("the<|im_end|>")[-1] == 2
    save_hf(opened, tmp_path / "b")
    for name, content in model.files.items():
        assert (tmp_path / "b" / name).read_bytes() == content


def test_an_unstacked_model_is_written_the_same(tmp_path):
    from jaxreason.models import decoder

    model = tiny_models.write_folder(tmp_path / "a")
    layers = dataclasses.replace(model, params=decoder.unstack(model.params))
    save_hf(layers, tmp_path / "b")
    names = [p.name for p in (tmp_path / "a").glob("*.safetensors")]
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names
    )


def edit(folder: pathlib.Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = {k: np.array(v) for k, v in safetensors_io.open_file(path).items()}
    change(tensors)
    path.unlink()
    safetensors.numpy.save_file(tensors, path)


def test_names_of_the_base_model_alone(tmp_path):
    tied = dataclasses.replace(tiny_models.LLAMA, tie_embeddings=True)
    model = tiny_models.write_folder(tmp_path / "a", tied)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]

    edit(tmp_path / "a", rename)
    opened = load_hf(tmp_path / "a", dtype="float32")
    np.testing.assert_array_equal(opened.params["embed"], model.params["embed"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update({"x.lora_A.weight": np.zeros(2, np.float32)}), "x.lora_A.weight"),
        (lambda t: t.update({"model.norm.weight": np.zeros(32, np.int32)}), "dtype int32"),
        (lambda t: t.update({"model.norm.weight": np.zeros(31, np.float32)}), r"shape \[31\]"),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            "tie_word_embeddings",
        ),
    ],
)
def test_weights_of_another_model(tmp_path, change, said):
    tied = dataclasses.replace(tiny_models.LLAMA, tie_embeddings=True)
    tiny_models.write_folder(tmp_path / "a", tied)
    edit(tmp_path / "a", change)
    with pytest.raises(UserError, match=said):
        load_hf(tmp_path / "a")


def test_a_pickle_is_not_opened(tmp_path):
    tiny_models.write_folder(tmp_path / "a")
    (tmp_path / "a/model.safetensors").rename(tmp_path / "a/pytorch_model.bin")
    with pytest.raises(UserError, match="never opened"):
        load_hf(tmp_path / "a")


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
    small = dataclasses.replace(tiny_models.LLAMA, vocab_size=len(tiny_models.TOKENS) - 1)
    tiny_models.write_folder(tmp_path / "a", small)
    with pytest.raises(UserError, match="265 ids, the model's embedding 264 rows"):
        load_hf(tmp_path / "a")


def test_vocabulary_and_merges_alone(tmp_path):
    """OPT's folders have no tokenizer.json; its tokenizer puts </s> in front."""
    tiny_models.write_folder(tmp_path / "a")
    vocab = {token: i for i, token in enumerate(tiny_models.TOKENS)}
    (tmp_path / "a/tokenizer.json").unlink()
    (tmp_path / "a/vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in tiny_models.MERGES)]
    (tmp_path / "a/merges.txt").write_text("\n".join(lines) + "\n")
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_end|>", "add_bos_token": True}
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps(settings))
    opened = load_hf(tmp_path / "a")
    expected = tokenizers.Tokenizer.from_str(tiny_models.tokenizer())
    text = " the inner there<|im_end|> a"
    assert opened.tokenizer.encode(text) == expected.encode(text).ids
    assert opened.bos_id == 2


def read_by_the_package(files: dict[str, bytes]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    tokenizer.encode_special_tokens = True
    return tokenizer


TEXTS = [path.read_text() for path in sorted((FOLDER.parent / "fixtures/text").glob("*.txt"))]
TEXTS += [own_text.PROBE, pathlib.Path(__file__).read_text(), "日本 \U0001f642 \x00\x7f\n\n  \t"]


def test_bytes_have_an_equal_tokenizer_json():
    ours, theirs = ByteTokenizer(), read_by_the_package(own_text.files_of(ByteTokenizer()))
    for text in TEXTS:
        assert theirs.encode(text).ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    theirs.encode_special_tokens = False
    assert theirs.encode("a<|endoftext|>").ids == [97, 256]


def test_sentencepiece_has_an_equal_tokenizer_json():
    ours = train_sentencepiece(TEXTS[:48], 500, symbols=("<think>",))
    theirs = read_by_the_package(own_text.files_of(ours))
    for text in [*TEXTS, "a <think> b<think>"]:
        assert theirs.encode(text).ids == ours.encode(text)
        assert theirs.decode(ours.encode(text), skip_special_tokens=False) == text


def test_a_mesh_gets_each_device_its_part(tmp_path):
    """Eight devices hold the values that one device holds, each its shard only."""
    moe = ModelConfig(
        vocab_size=48, d_model=16, num_layers=2, num_heads=4, d_ff=8, qk_norm=True,
        qk_norm_scope="all", moe=Moe(num_experts=4, top_k=2),
    )  # fmt: skip
    save_hf(Model(tiny_models.params(moe), moe), tmp_path / "olmoe")
    run_python(
        """
        import sys, jax, numpy as np
        from jaxreason.core.mesh import MeshConfig, make_mesh
        from jaxreason.models.hf import load_hf
        mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2))
        one, many = load_hf(sys.argv[1]).params, load_hf(sys.argv[1], mesh=mesh).params
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)):
            np.testing.assert_array_equal(a, b)
        for leaf, cut in ((many["blocks"]["mlp"]["down"], 8), (many["embed"], 8)):
            assert {s.data.size for s in leaf.addressable_shards} == {leaf.size // cut}
        """,
        str(tmp_path / "olmoe"),
    )
