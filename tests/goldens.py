"""Golden arrays, and their weights in this program's layout."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import parity
from jaxreason.models.hf import load_hf

FOLDER = pathlib.Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of `tests/golden/<name>.npz`."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def open_family(family: str):
    """The model of `tests/golden/hf/<family>`, in float32, and its reference arrays."""
    folder = FOLDER / "hf" / family
    return load_hf(folder, dtype="float32"), parity.reference(folder)


def llama_params(z: dict[str, np.ndarray], layers: int, prefix: str = "p/"):
    """Hugging Face Llama weights (out, in) as the decoder's parameters."""
    width = z[f"{prefix}model.norm.weight"].shape[0]
    heads = {"q": 4, "k": 2, "v": 2}

    def stack(name, change=lambda w: w):
        names = [f"{prefix}model.layers.{i}.{name}.weight" for i in range(layers)]
        return np.stack([change(z[n]) for n in names])

    attn = {
        n: stack(f"self_attn.{n}_proj", lambda w, h=h: w.T.reshape(width, h, -1))
        for n, h in heads.items()
    }
    attn["o"] = stack("self_attn.o_proj", lambda w: w.T.reshape(heads["q"], -1, width))
    params = {
        "embed": z[f"{prefix}model.embed_tokens.weight"],
        "final_norm": z[f"{prefix}model.norm.weight"],
        "unembed": z[f"{prefix}lm_head.weight"].T,
        "blocks": {
            "attn_norm": stack("input_layernorm"),
            "mlp_norm": stack("post_attention_layernorm"),
            "attn": attn,
            "mlp": {n: stack(f"mlp.{n}_proj", lambda w: w.T) for n in ("gate", "up", "down")},
        },
    }
    return jax.tree.map(jnp.asarray, params)
