"""Tiny random Hugging Face models of every family, and what transformers computes with them.

Run by a Python of its own that has torch and transformers:

    PYTHON benchmarks/torch_models.py --out=FOLDER [--seed=1] [--scale=4] [--only=llama,opt_pre]
    PYTHON benchmarks/torch_models.py --out=FOLDER --exports=EXPORTED_FOLDER

The first writes a folder a family: the model as `save_pretrained` leaves it (or as released models
look: older names in config.json, shards, buffers of older versions) and `reference.npz`. Its shapes
are odd on purpose, and nothing is left at one or zero. `--scale=1` is what `tests/golden/hf` holds.
The second loads models exported from those folders and prints how far they are, as JSON.
"""

import argparse
import json
import pathlib
import shutil

import numpy as np
import tokenizers
import torch
import transformers
from torch_families import families

LENGTHS = (13, 8, 3)  # Ragged rows whose every number is kept.
MORE = 16  # Whole rows on which bfloat16 is measured as well: the largest of few errors is chance.
PROMPTS = (7, 2, 4)
NEW_TOKENS = 10
CANDIDATES = 64
ALL = LENGTHS + (max(LENGTHS),) * MORE
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@torch.no_grad()
def randomise(model, generator: torch.Generator) -> None:
    """Fills every parameter: norm scales about one, biases about zero, matrices by fan-in."""
    tied = model.config.tie_word_embeddings
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim == 1:
            p.copy_(0.3 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
        elif "embed" in name and "proj" not in name:
            p.copy_((0.4 if tied else 1.0) * noise)
        else:
            gain = 2.5 if "mlp.gate.weight" in name else 1.2
            p.copy_(gain * noise / p.shape[-1] ** 0.5)


def write_tokenizer(folder: pathlib.Path, vocab_size: int) -> None:
    """A byte-level BPE of its own with chat markers, as SmolLM2 and Qwen have."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 4, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    text = "the cat sat on the mat and then the other cat sat there, thinking of the mat. "
    made.train_from_iterator([text, "What then? 12 + 30 = 42, said the cat."], trainer)
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT,
        "model_max_length": 128, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def as_released(folder: pathlib.Path) -> None:
    """Rewrites config.json with the names that released models of these families carry."""
    path = folder / "config.json"
    cfg = json.loads(path.read_text())
    cfg["torch_dtype"] = cfg.pop("dtype")
    rope = cfg.pop("rope_parameters", {})
    theta, kind = rope.pop("rope_theta", None), rope.get("rope_type")
    if cfg["model_type"] == "gpt_neox":
        cfg["rotary_emb_base"], cfg["rotary_pct"] = theta, rope.pop("partial_rotary_factor")
        cfg.pop("attention_bias", None)
    elif theta is not None:
        cfg["rope_theta"] = theta
    if kind == "linear":  # The oldest form of all.
        cfg["rope_scaling"] = {"type": "linear", "factor": rope["factor"]}
    elif kind == "llama3":
        cfg["rope_scaling"] = rope
    path.write_text(json.dumps(cfg, indent=2, sort_keys=True) + "\n")


def add_buffers(folder: pathlib.Path) -> None:
    """Adds what Pythia's files hold beside the parameters: masks and rotary frequencies."""
    from safetensors import torch as st

    tensors = st.load_file(folder / "model.safetensors")
    layers = {n.split(".")[2] for n in tensors if n.startswith("gpt_neox.layers.")}
    for i in layers:
        at = f"gpt_neox.layers.{i}.attention."
        tensors[at + "bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
        tensors[at + "masked_bias"] = torch.tensor(-1e9)
        tensors[at + "rotary_emb.inv_freq"] = torch.ones(2)
    st.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: pathlib.Path, dtype):
    """The model that transformers makes of a folder."""
    kind = transformers.AutoConfig.from_pretrained(folder)
    # The grouped products of experts refuse odd widths.
    experts = {"experts_implementation": "eager"} if hasattr(kind, "num_experts") else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **experts)
    return model.eval()


@torch.no_grad()
def run(model, tokens: np.ndarray, lengths) -> dict[str, np.ndarray]:
    """Logits [N,V], hidden states [L+1,N,D] and `final` [N,D] of the N real tokens, row by row.

    State 0 goes into the first block, state k comes out of block k, `final` is after the last norm.
    """
    base = model.base_model
    base = getattr(base, "decoder", base)
    norm = getattr(base, "norm", None) or getattr(base, "final_layer_norm", None)
    states, final = {}, {}

    def keep(into, key):
        def hook(_, inputs, output):
            into[key] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_input(_, inputs, kwargs):
        states[0] = inputs[0] if inputs else kwargs["hidden_states"]

    handles = [base.layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    for i, layer in enumerate(base.layers):
        handles.append(layer.register_forward_hook(keep(states, i + 1)))
    if norm is not None:
        handles.append(norm.register_forward_hook(keep(final, 0)))
    mask = (np.arange(tokens.shape[1])[None] < np.asarray(lengths)[:, None]).astype(np.int64)
    router = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}
    out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask), use_cache=False, **router)
    for handle in handles:
        handle.remove()
    real = torch.tensor(mask.astype(bool))
    hidden = torch.stack([states[i] for i in range(len(base.layers) + 1)])[:, real]
    result = {"logits": out.logits[real], "hidden": hidden, "final": final.get(0, states[i + 1])}
    result["final"] = result["final"][real] if result["final"].ndim == 3 else result["final"]
    if router:
        result["aux_loss"] = out.aux_loss
    return {k: v.float().numpy() for k, v in result.items()}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, so that the error is the logits'."""
    return torch.tensor(logits).double().log_softmax(-1).numpy()


@torch.no_grad()
def clear_routes(model, candidates: list[np.ndarray]) -> np.ndarray:
    """Of each row's candidates, the one whose choices of experts are least near to a tie.

    At a tie, rounding to bfloat16 sends a token to another expert, in transformers or in ours, and
    the larger error would be chance.
    """
    k, chosen = model.config.num_experts_per_tok, []
    for n, rows in zip(ALL, candidates):
        out = model(torch.tensor(rows[:, :n]), output_router_logits=True)
        top = torch.stack(out.router_logits).topk(k + 1).values
        gaps = (top[..., k - 1] - top[..., k]).reshape(-1, len(rows), n).amin(dim=(0, 2))
        row = rows[int(gaps.argmax())]
        chosen.append(row * (np.arange(len(row)) < n))
    return np.stack(chosen)


@torch.no_grad()
def greedy(model, prompts: np.ndarray, lengths) -> tuple[np.ndarray, float]:
    """`transformers.generate` without an end token, left-padded; also the narrowest top-2 gap."""
    model.generation_config.eos_token_id = None
    width = prompts.shape[1]
    rows = np.stack([np.roll(row, width - n) for row, n in zip(prompts, lengths)])
    mask = (np.arange(width)[None] >= width - np.asarray(lengths)[:, None]).astype(np.int64)
    out = model.generate(
        torch.tensor(rows), attention_mask=torch.tensor(mask), do_sample=False, pad_token_id=0,
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    top = torch.stack(out.logits).float().topk(2).values
    return out.sequences[:, width:].numpy(), float((top[..., 0] - top[..., 1]).min())


def make(folder: pathlib.Path, seed: int, kind: str, settings: dict, look: dict) -> dict:
    """Writes one family's model and reference; returns facts for the table."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    cfg = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(cfg, dtype=torch.float32)
    randomise(model, generator)
    model = model.to(getattr(torch, look.get("dtype", "float32")))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    shards = {"max_shard_size": size // 3} if look.get("shard") else {}
    model.save_pretrained(folder, **shards)
    vocab = cfg.vocab_size
    rng = np.random.default_rng(seed)

    def rows(lengths):
        grid = rng.integers(3, vocab, (len(lengths), max(lengths)))
        return grid * (np.arange(max(lengths))[None] < np.asarray(lengths)[:, None])

    # The end token is one that the first prompt's greedy text reaches half-way.
    prompts = rows(PROMPTS)
    text, _ = greedy(load(folder, torch.float32), prompts, PROMPTS)
    path = folder / "config.json"
    end = {"eos_token_id": int(text[0, NEW_TOKENS // 2]), "pad_token_id": 0}
    path.write_text(json.dumps({**json.loads(path.read_text()), **end}, indent=2) + "\n")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **end}, indent=2) + "\n")
    if look.get("released"):
        as_released(folder)
    if look.get("buffers"):
        add_buffers(folder)
    if look.get("tokenizer"):
        write_tokenizer(folder, vocab)

    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)

    full, half = load(folder, torch.float32), load(folder, torch.bfloat16)
    tokens = rows(ALL)
    if "num_experts" in settings:
        tokens = clear_routes(full, [rows([max(ALL)] * CANDIDATES) for _ in ALL])
    everything, low = run(full, tokens, ALL), run(half, tokens, ALL)
    error = np.abs(log_softmax(low["logits"]) - log_softmax(everything["logits"])).max()
    result = run(full, tokens[: len(LENGTHS)], LENGTHS)
    batch, gap = greedy(full, prompts, PROMPTS)
    for row, n, expected in zip(prompts, PROMPTS, batch):
        single, _ = greedy(full, row[None, :n], [n])
        if not np.array_equal(single[0], expected):
            raise SystemExit(f"{folder.name}: transformers' own batch differs from single prompts")
    np.savez_compressed(
        folder / "reference.npz",
        tokens=tokens.astype(np.int32), lengths=np.asarray(ALL, np.int32),
        kept_rows=np.int32(len(LENGTHS)), bf16_error=np.float64(error),
        prompts=prompts.astype(np.int32), prompt_lengths=np.asarray(PROMPTS, np.int32),
        greedy=batch.astype(np.int32), eos_id=np.int32(end["eos_token_id"]),
        **result,
    )  # fmt: skip
    return {
        "params": sum(p.numel() for p in full.parameters()),
        "files": sum(f.stat().st_size for f in folder.iterdir()),
        "narrowest_top2": gap,
        "logits_std": float(result["logits"].std()),
    }


def compare(folder: pathlib.Path, exported: pathlib.Path) -> dict:
    """How far transformers is from the reference when it loads what we exported."""
    with np.load(folder / "reference.npz") as z:
        ref = dict(z)
    model = load(exported, torch.float32)
    kept = int(ref["kept_rows"])
    result = run(model, ref["tokens"][:kept], ref["lengths"][:kept])
    text, _ = greedy(model, ref["prompts"], ref["prompt_lengths"])
    theirs, ours = load(folder, "auto"), load(exported, "auto")
    a, b = theirs.state_dict(), ours.state_dict()
    for state in (a, b):  # OPT's positions begin at row 2; nothing real reads the rows before.
        if (table := "model.decoder.embed_positions.weight") in state:
            state[table] = state[table][2:]
    equal = a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )
    same_text = True
    if (folder / "tokenizer.json").exists():
        first, second = (transformers.AutoTokenizer.from_pretrained(f) for f in (folder, exported))
        sample = [{"role": "user", "content": "Where did the cat sit? Émile knows."}]
        same_text = first.apply_chat_template(sample) == second.apply_chat_template(sample)
    return {
        "logits": float(np.abs(result["logits"] - ref["logits"]).max()),
        "greedy_equal": bool(np.array_equal(text, ref["greedy"])),
        "tensors_equal": equal,
        "chat_equal": bool(same_text),
    }


def main() -> None:
    """Makes models, or compares exports with them; the last line of output is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder of the models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--only", default="", help="some of the families, with commas")
    parser.add_argument("--exports", default="", help="a folder of exports to compare")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out = pathlib.Path(args.out)
    result = {}
    for i, (name, made) in enumerate(families(args.scale).items()):
        if args.only and name not in args.only.split(","):
            continue
        if args.exports:
            result[name] = compare(out / name, pathlib.Path(args.exports) / name)
        else:
            result[name] = make(out / name, 1000 * args.seed + i, *made)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions, "families": result}))


if __name__ == "__main__":
    main()
