"""Small models for the tests of generation, with tokenizers whose text is interesting."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core import params as P
from jaxreason.models import decoder
from jaxreason.models.model import Model

CONFIG = decoder.ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48, init_std=0.3
)
EOS = 63
EOS_IDS = (63, 11, 29)  # Random models end a reply now and then.
# Words, letters, spaces; a character and a stop string whose parts are tokens of their own.
PIECES = [b"he", b"llo", b" wor", b"ld", b"\n", b"a", b"b", b"ab", b" ", b"END", b"EN", b"D", b"c"]
PIECES += [b"\xe2\x82", b"\xac", b"\xe2\x82\xac"]


class PieceTokenizer:
    """Token i is a piece of bytes; the pieces repeat over the 64 ids, and the last id is the end.

    Encoding takes a token a byte: its value modulo 60.
    """

    vocab_size, eos_id, bos_id, fingerprint = 64, EOS, None, "pieces"

    def encode(self, text: str) -> list[int]:
        return [b % 60 for b in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        pieces = [PIECES[int(i) % len(PIECES)] for i in ids if int(i) != EOS]
        return b"".join(pieces).decode(errors="replace")


@functools.cache
def tiny_model(**changes) -> Model:
    """A random float32 model; `changes` are to its config."""
    cfg = dataclasses.replace(CONFIG, **changes)
    params = P.initialise(decoder.specs(cfg), jax.random.key(1))
    return Model(
        params=params, config=cfg, tokenizer=PieceTokenizer(), eos_ids=EOS_IDS, name="tiny"
    )


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def _full(params, tokens, cfg, dtype):
    ones = jnp.ones(tokens.shape, jnp.int32)
    batch = {"tokens": tokens, "segment_ids": ones, "positions": jnp.cumsum(ones, 1) - 1}
    return jax.nn.log_softmax(decoder.logits(decoder.forward(params, cfg, batch, dtype=dtype)))


def full_logprobs(model: Model, tokens: Sequence[int], width: int = 64) -> np.ndarray:
    """Log-probabilities [T,V] of the training forward over a whole sequence (one program)."""
    assert len(tokens) <= width
    row = np.resize(np.asarray(tokens, np.int32), width)[None]
    return np.asarray(_full(model.params, row, model.config, jnp.float32))[0, : len(tokens)]


def greedy(model: Model, prompt: Sequence[int], new: int) -> list[int]:
    """Argmax over full recomputation, token by token, to the end-of-text token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new:
        tokens.append(int(np.argmax(full_logprobs(model, tokens)[-1])))
        if tokens[-1] in model.eos_ids:
            break
    return tokens[len(prompt) :]


def ragged_prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    """Prompts of different lengths, one of a single token among them."""
    rng = np.random.default_rng(seed)
    lengths = [1, *rng.integers(2, longest + 1, count - 1)]
    return [rng.integers(0, 63, n).tolist() for n in lengths]
