"""The golden Llama and a random one under wraps: teacher-forced, and prompt then cached decode."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core import params as P
from jaxreason.depth import first
from jaxreason.depth.decision import Decision, decide, keep_wrap, read_wrap, static_routers
from jaxreason.models import decoder

GOLDEN = decoder.ModelConfig(
    vocab_size=37, d_model=16, num_layers=5, num_heads=4, num_kv_heads=2, d_ff=24
)
SCANNED = dataclasses.replace(GOLDEN, layers="scan")  # Compiles one layer; teacher-forced only.
ALL = Decision(always_keep=())


def random_model(seed: int = 0):
    """Parameters whose layers matter, and routers whose decisions differ between prompts."""
    cfg = dataclasses.replace(GOLDEN, init_std=0.3)
    params = P.initialise(decoder.specs(cfg), jax.random.key(seed))
    w = jax.random.normal(jax.random.key(seed + 1), (5, 16))
    return params, {"w": w, "b": jnp.zeros(5)}


def static(keep: Iterable[int] = (0, 2, 4)) -> dict[str, jax.Array]:
    """Routers that keep these layers of the golden model."""
    kept = set(keep)
    return static_routers(tuple(layer in kept for layer in range(5)), 16)


def rows(tokens, prompts, length: int | None = None):
    """A training batch of one segment a row: `tokens` are lists, `prompts` their prompts' sizes."""
    length = length or max(map(len, tokens))
    out = {k: np.zeros((len(tokens), length), np.int32) for k in ("tokens", "segment_ids")}
    mask = np.zeros((len(tokens), length), np.float32)
    for i, (row, prompt) in enumerate(zip(tokens, prompts, strict=True)):
        out["tokens"][i, : len(row)] = row
        out["segment_ids"][i, : len(row)] = 1
        mask[i, :prompt] = 1
    out["positions"] = np.tile(np.arange(length, dtype=np.int32), (len(tokens), 1))
    return {k: jnp.asarray(v) for k, v in out.items()} | {"prompt_mask": jnp.asarray(mask)}


def forced(params, cfg: first.FirstConfig, routers, batch, *, hard=True, model=SCANNED):
    """Training's forward: logits [B,T,V] and gates."""
    return _forced(params, routers, batch, cfg=cfg, hard=hard, model=model)


@functools.partial(jax.jit, static_argnames=("cfg", "hard", "model"))
def _forced(params, routers, batch, *, cfg, hard, model):
    def run(wrap):
        return decoder.forward(params, model, batch, wrap=wrap)

    out = first.forward(cfg, routers, batch, run, hard=hard)
    return decoder.logits(out), out.depth


@functools.partial(jax.jit, static_argnames="model")
def plain(params, batch, model=SCANNED):
    """Logits [B,T,V] of the model as it is."""
    return decoder.logits(decoder.forward(params, model, batch))


@jax.jit
def _read(params, skipper, batch, cache):
    wrap = read_wrap(skipper, batch["segment_ids"] > 0)
    out = decoder.forward(params, GOLDEN, batch, cache=cache, wrap=wrap)
    return decoder.logits(out), out.cache, out.depth


@jax.jit
def _step(params, keep, token, cache):
    batch = {
        "tokens": token[:, None],
        "positions": cache.lengths[:, None],
        "segment_ids": jnp.ones((token.shape[0], 1), jnp.int32),
    }
    out = decoder.forward(params, GOLDEN, batch, cache=cache, wrap=keep_wrap(keep))
    return decoder.logits(out)[:, 0], out.cache


def cached(params, skipper, prompts, new_tokens, pieces: int = 1):
    """Generation's forward: a ragged batch's prompts are read, then tokens are fed one by one.

    `prompts`: lists of tokens; `new_tokens`: [B,N], or a number of tokens to choose greedily.
    Returns (logits [B,N+1,V] after the prompt and each new token, keep [B,L], tokens [B,N]).
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    width = -(-int(max(lengths.max(), 1)) // pieces)
    table = np.zeros((len(prompts), width * pieces), np.int32)
    for row, prompt in zip(table, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = decoder.init_cache(GOLDEN, len(prompts), 32, jnp.float32)

    last, reading = jnp.zeros((len(prompts), GOLDEN.vocab_size)), None
    for piece in range(pieces):
        at = np.arange(piece * width, (piece + 1) * width, dtype=np.int32)
        new = np.clip(lengths - piece * width, 0, width)
        batch = {
            "tokens": table[:, at],
            "positions": np.tile(at, (len(prompts), 1)),
            "segment_ids": (at[None] < lengths[:, None]).astype(np.int32),
        }
        logits, cache, own = _read(params, skipper, batch, cache)
        reading = own if reading is None else reading + own
        at_end = jnp.take_along_axis(logits, jnp.maximum(new - 1, 0)[:, None, None], axis=1)[:, 0]
        last = jnp.where((new > 0)[:, None], at_end, last)
    assert reading is not None
    keep = decide(skipper, reading)
    greedy = isinstance(new_tokens, int)
    every, drawn = [last], []
    for i in range(new_tokens if greedy else new_tokens.shape[1]):
        token = jnp.argmax(every[-1], axis=-1) if greedy else jnp.asarray(new_tokens[:, i])
        last, cache = _step(params, keep, token.astype(jnp.int32), cache)
        drawn.append(token)
        every.append(last)
    return jnp.stack(every, axis=1), keep, np.stack(drawn, axis=1)
