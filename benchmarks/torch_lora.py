"""What peft computes with adapters, on the tiny models of `torch_models.py`, and of ours.

Run by a Python of its own that has torch, transformers and peft:

    PYTHON benchmarks/torch_lora.py --out=tests/golden/peft
    PYTHON benchmarks/torch_lora.py --exports=FOLDER

The first writes a folder a case: an adapter with random A and B as `save_pretrained` leaves it, and
`reference.npz` with the logits [16,V] of the first tokens that the model's own reference keeps. The
second reads adapters that we exported, FOLDER/<model>/<case>, with our logits of these tokens in
ours.npy beside them, and prints the largest differences as JSON.
"""

import argparse
import json
import pathlib

import numpy as np
import peft
import torch
from torch_models import load

MODELS = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "hf"
TOKENS = 16
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama": {"r": 3, "lora_alpha": 5, "target_modules": LLAMA},
    "qwen2": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "gpt_neox": {
        "r": 2, "lora_alpha": 6,
        "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    },
    "opt_post": {
        "r": 2, "lora_alpha": 4,
        "target_modules": ["k_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"],
    },
}  # fmt: skip


@torch.no_grad()
def logits(model, ref) -> np.ndarray:
    """Float32 [16,V] of the first real tokens of the kept rows."""
    rows = int(ref["kept_rows"])
    tokens, lengths = torch.tensor(ref["tokens"][:rows]), torch.tensor(ref["lengths"][:rows])
    mask = (torch.arange(tokens.shape[1])[None] < lengths[:, None]).long()
    out = model(tokens.long(), attention_mask=mask, use_cache=False)
    return out.logits[mask.bool()][:TOKENS].numpy()


def base_of(name: str):
    """The tiny model of a folder in float32, and its reference arrays."""
    return load(MODELS / name, torch.float32), np.load(MODELS / name / "reference.npz")


def make(out: pathlib.Path) -> None:
    """Writes every case."""
    generator = torch.Generator().manual_seed(0)
    for name, settings in CASES.items():
        model, ref = base_of(name)
        config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **settings)
        model = peft.get_peft_model(model, config).eval()
        for key, p in model.named_parameters():
            if "lora_" in key:
                with torch.no_grad():
                    p.copy_(0.2 * torch.randn(p.shape, generator=generator))
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(out / name)
        (out / name / "README.md").unlink()
        adapted = logits(model, ref)
        np.savez_compressed(out / name / "reference.npz", logits=adapted)
        print(name, float(np.abs(adapted - ref["logits"][:TOKENS]).max()))


def check(exports: pathlib.Path) -> None:
    """Prints, for every exported adapter, how far peft's logits are from ours."""
    found = {}
    for folder in sorted(path.parent for path in exports.glob("*/*/adapter_config.json")):
        model, ref = base_of(folder.parent.name)
        theirs = logits(peft.PeftModel.from_pretrained(model, folder).eval(), ref)
        ours = np.load(folder / "ours.npy")
        found[f"{folder.parent.name}/{folder.name}"] = float(np.abs(theirs - ours).max())
    print(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--exports", type=pathlib.Path)
    args = parser.parse_args()
    if args.out:
        make(args.out)
    if args.exports:
        check(args.exports)
