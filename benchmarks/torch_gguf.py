"""What transformers makes of a GGUF file's dequantised weights, without any reader of ours.

Run by a Python of its own that has torch, transformers and gguf:

    PYTHON benchmarks/torch_gguf.py --gguf=FILE --text=FILE

Prints one line of JSON: the text's tokens and the mean negative log-likelihood of those that have
one before them in a window, greedy text after a few prompts, and the prompts' tokens. The tensors
are dequantised by the gguf package, rows of queries and keys put back in transformers' order.
"""

import argparse
import importlib.metadata
import json
import pathlib

import gguf
import jinja2
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import pre_tokenizers

WINDOW = 512
NEW_TOKENS = 48
NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
QUESTION = [{"role": "user", "content": "What is a heap? Answer in one sentence."}]
PROMPTS = ["The capital of France is", "def fibonacci(n):\n    "]


def read(path: str):
    """The model in float32, its tokenizer, and its metadata."""
    reader = gguf.GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    cfg = transformers.LlamaConfig(
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
    )
    heads = {"attn_q": cfg.num_attention_heads, "attn_k": cfg.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weight = weight.reshape(tuple(reversed(tensor.shape.tolist())))
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in heads:  # llama.cpp stores (pair, half) where transformers has halves.
                turned = weight.reshape(heads[parts[2]], -1, 2, weight.shape[-1])
                weight = turned.swapaxes(1, 2).reshape(weight.shape)
            name = f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]]
            name += ".weight"
        state[name] = torch.from_numpy(np.ascontiguousarray(weight))
    model = transformers.LlamaForCausalLM(cfg)
    missing, unknown = model.load_state_dict(state, strict=False)
    if set(missing) != {"lm_head.weight"} or unknown:
        raise SystemExit(f"tensors missing {missing}, unknown {unknown}")
    model.tie_weights()
    return model.eval(), tokenizer_of(meta), meta


def tokenizer_of(meta: dict) -> tokenizers.Tokenizer:
    """SmolLM2's tokenizer: single digits, then byte-level BPE."""
    vocab = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(line.split(" ")) for line in meta["tokenizer.ggml.merges"]]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    control = [t for t, kind in zip(meta["tokenizer.ggml.tokens"], kinds) if kind == 3]
    made.add_special_tokens(control)
    return made


@torch.no_grad()
def main() -> None:
    """Reads, scores the text, writes greedy text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--text", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model, tokenizer, meta = read(args.gguf)
    tokens = tokenizer.encode(pathlib.Path(args.text).read_text()).ids
    tokens = tokens[: len(tokens) // WINDOW * WINDOW]
    windows = torch.tensor(tokens).reshape(-1, WINDOW)
    losses = [
        torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).item()
        for row in windows
    ]
    template = jinja2.Environment().from_string(meta["tokenizer.chat_template"])
    prompts = [*PROMPTS, template.render(messages=QUESTION, add_generation_prompt=True)]
    greedy = []
    model.generation_config.eos_token_id = None
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            max_new_tokens=NEW_TOKENS,
        )  # fmt: skip
        greedy.append(out[0, ids.shape[1] :].tolist())
    print(
        json.dumps(
            {
                "window": WINDOW,
                "tokens": tokens,
                "nll": float(np.mean(losses)),
                "prompts": prompts,
                "prompt_tokens": [tokenizer.encode(p).ids for p in prompts],
                "greedy": greedy,
                "text": [tokenizer.decode(ids, skip_special_tokens=True) for ids in greedy],
                "versions": {"gguf": importlib.metadata.version("gguf")},
            }
        )
    )


if __name__ == "__main__":
    main()
