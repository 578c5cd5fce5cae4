"""The case of `benchmarks.parity` with real weights: a quantised SmolLM2 in a GGUF file.

What ours reads and dequantises is held against transformers on weights that the gguf package
dequantised (`torch_gguf.py`): the tokens of a text and its perplexity, and greedy text.
"""

import functools
import heapq
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import parity
from jaxreason.models import decoder
from jaxreason.models.model import Model
from jaxreason.recipes.open_model import open_model
from jaxreason.rollout import GREEDY, generate

# A fixed text that every Python carries, the same in all versions.
TEXT = heapq.__about__


@functools.partial(jax.jit, static_argnames="cfg")
def _nll(params, batch, cfg):
    logits = decoder.logits(decoder.forward(params, cfg, batch, dtype=jnp.float32))[:, :-1]
    picked = jnp.take_along_axis(logits, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()


def nll(model: Model, tokens: list[int], window: int) -> float:
    """Mean negative log-likelihood in nats, over windows that know nothing of each other."""
    rows = np.array(tokens).reshape(-1, window).tolist()
    losses = [float(_nll(model.params, parity.batch_of([[r]], window), model.config)) for r in rows]
    return float(np.mean(losses))


def measure(python: str, path: str) -> dict:
    """Facts of the comparison; `python` has torch, transformers and gguf."""
    with tempfile.TemporaryDirectory() as folder:
        text = pathlib.Path(folder) / "text.txt"
        text.write_text(TEXT)
        theirs = parity.run_torch(python, "torch_gguf.py", f"--gguf={path}", f"--text={text}")
    model = open_model(path, dtype="float32")
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(TEXT)[: len(theirs["tokens"])]
    ours = nll(model, theirs["tokens"], theirs["window"])
    done = generate(
        model, theirs["prompts"], GREEDY, max_new_tokens=len(theirs["greedy"][0]), ignore_eos=True
    )
    return {
        "file": pathlib.Path(path).name,
        "text_tokens": len(tokens),
        "tokens_equal": tokens == theirs["tokens"]
        and [model.tokenizer.encode(p) for p in theirs["prompts"]] == theirs["prompt_tokens"],
        "nll_transformers": theirs["nll"],
        "nll_ours": ours,
        "nll_difference": abs(ours - theirs["nll"]),
        "greedy_equal": [c.tokens for c in done] == theirs["greedy"],
        "text": theirs["text"],
        "versions": theirs["versions"],
    }
