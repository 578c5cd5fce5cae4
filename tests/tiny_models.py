"""Tiny models on disk for the tests of what is read from files: a Hugging Face folder, a GGUF."""

import json
import pathlib

import gguf
import jax
import numpy as np

from jaxreason.core import params as P
from jaxreason.models import decoder
from jaxreason.models.byte_bpe import byte_characters, tokenizer_json
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.hf import save_hf
from jaxreason.models.model import Model

SPECIAL = {0: ("<|endoftext|>", True), 1: ("<|im_start|>", True), 2: ("<|im_end|>", True)}
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("e", "r")]
TOKENS = [token for token, _ in SPECIAL.values()] + byte_characters() + ["".join(m) for m in MERGES]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
LLAMA = ModelConfig(
    vocab_size=len(TOKENS) + 6, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=64,
    rope_base=5000.0, init_std=0.2,
)  # fmt: skip


def tokenizer() -> str:
    """A byte-level BPE tokenizer.json of three special tokens, the bytes and six merges."""
    vocab = {token: i for i, token in enumerate(TOKENS)}
    return tokenizer_json(vocab, MERGES, cut="smollm", added=SPECIAL)


def files() -> dict[str, bytes]:
    """The tokenizer's files of a folder."""
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    return {
        "tokenizer.json": tokenizer().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [2, 0]}).encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }


def params(cfg: ModelConfig, seed: int = 0):
    """Random parameters whose norms and biases are not those of a fresh model."""
    key = jax.random.key(seed)
    fresh = P.initialise(decoder.specs(cfg), key)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), fresh)


def write_folder(folder: pathlib.Path, cfg: ModelConfig = LLAMA, shard_bytes: int = 4 << 30):
    """A Hugging Face folder of a random model with the tokenizer; returns the model."""
    model = Model(params(cfg), cfg, eos_ids=(2, 0), context=64, files=files())
    save_hf(model, folder, shard_bytes=shard_bytes)
    return model


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order, from Hugging Face's."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: pathlib.Path, kind: str = "F32", cfg: ModelConfig = LLAMA) -> dict:
    """A GGUF of a random Llama, its matrices of a type; returns the values by HF name."""
    from jaxreason.models import hf
    from jaxreason.models.hf_names import FAMILIES, places

    theirs = {
        "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(cfg.num_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(cfg.d_model)
    writer.add_feed_forward_length(cfg.d_ff)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_rope_freq_base(cfg.rope_base)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if i in SPECIAL else 1 for i in range(len(TOKENS))])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    model, kept = Model(params(cfg), cfg), {}
    tensors = {name: make() for name, _, make in hf.tensors_of(model, "llama")}
    assert list(tensors) == [p.name for p in places(cfg, FAMILIES["llama"])]
    quantised = gguf.GGMLQuantizationType[kind]
    for name, value in tensors.items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        layer, module = (parts[1], ".".join(parts[2:])) if parts[0] == "layers" else ("", parts[0])
        ours = f"blk.{layer}.{theirs[module]}.weight" if layer else f"{theirs[module]}.weight"
        heads = {"attn_q": cfg.num_heads, "attn_k": cfg.kv_heads}.get(theirs[module], 0)
        value = np.ascontiguousarray(turned(value, heads) if heads else value, np.float32)
        if value.ndim == 1 or kind == "F32":
            writer.add_tensor(ours, value)
        else:
            packed = gguf.quantize(value, quantised)
            writer.add_tensor(ours, packed, raw_dtype=quantised)
            value = gguf.dequantize(packed, quantised).reshape(value.shape)
        back = value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2) if heads else value
        kept[name] = back.reshape(value.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept
