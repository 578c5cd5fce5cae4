"""Choosing the next token from logits: temperature and the filters, a row with its own settings.

The settings of a batch are arrays, so that requests with different ones share one program. The
filters are thresholds: a token's fate depends on its own probability and not on how ties are
sorted. Order: temperature, top-k, top-p of what is left, min-p.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.nn.kernels.decode import best as most_likely

FILTERED = float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the model's distribution."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token, and no filter matters."""
    top_k: int = 0
    """Keeps the k most likely tokens, and those as likely as the last of them; 0 keeps all."""
    top_p: float = 1.0
    """Keeps tokens while the more likely ones together have less than this probability
    (nucleus sampling, arXiv 1904.09751); 1 keeps all."""
    min_p: float = 0.0
    """Keeps tokens at least this fraction as likely as the most likely (arXiv 2407.01082)."""

    def validate(self) -> None:
        """Raises UserError for a setting out of its range."""
        ranges = {
            "temperature": (0 <= self.temperature < float("inf"), "0 or above"),
            "top_k": (self.top_k >= 0, "0 (no limit) or above"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
        }
        for name, (good, expected) in ranges.items():
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}; expected {expected}")


GREEDY = Sampling(temperature=0.0)


@flax.struct.dataclass
class SamplingArrays:
    """The settings of a batch's rows, each [B]."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


def stack_settings(settings: Sequence[Sampling]) -> SamplingArrays:
    """The settings of rows as arrays (of NumPy, for the host)."""

    def column(name: str, dtype: Any) -> Any:
        return np.array([getattr(s, name) for s in settings], dtype)

    return SamplingArrays(
        column("temperature", np.float32),
        column("top_k", np.int32),
        column("top_p", np.float32),
        column("min_p", np.float32),
    )


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 that sort as the float32 do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _at_least(x_bv: jax.Array, weight_bv: jax.Array, limit_b: jax.Array) -> jax.Array:
    """Boolean [B,V]: values whose strictly greater ones together weigh less than `limit`.

    A search over the 32 bits of the threshold, each a sum over the row: a tenth of the time of a
    sort on CPU.
    """
    keys = _ordered(x_bv)

    def refine(i, threshold):
        # The greatest threshold at which what lies at or above it still weighs the limit.
        trial = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        weight = jnp.sum(jnp.where(keys >= trial[:, None], weight_bv, 0), axis=1)
        return jnp.where(weight >= limit_b, trial, threshold)

    threshold = jax.lax.fori_loop(0, 32, refine, jnp.zeros(x_bv.shape[0], jnp.uint32))
    return keys >= threshold[:, None]


def _filter(scores_bv: jax.Array, settings: SamplingArrays) -> jax.Array:
    def top_k(scores):
        k = jnp.where(settings.top_k > 0, settings.top_k, scores.shape[1])
        ones = jnp.ones_like(scores)
        return jnp.where(_at_least(scores, ones, k.astype(jnp.float32)), scores, FILTERED)

    def top_p(scores):
        kept = _at_least(scores, jax.nn.softmax(scores, axis=-1), settings.top_p)
        return jnp.where(kept | (settings.top_p >= 1)[:, None], scores, FILTERED)

    def min_p(scores):
        least = jnp.max(scores, axis=-1, keepdims=True) + jnp.log(settings.min_p)[:, None]
        return jnp.where(scores >= least, scores, FILTERED)

    # A filter that no row asks for costs nothing.
    same = lambda scores: scores  # noqa: E731
    scores_bv = jax.lax.cond(jnp.any(settings.top_k > 0), top_k, same, scores_bv)
    scores_bv = jax.lax.cond(jnp.any(settings.top_p < 1), top_p, same, scores_bv)
    return jax.lax.cond(jnp.any(settings.min_p > 0), min_p, same, scores_bv)


def process(logits_bv: jax.Array, settings: SamplingArrays) -> jax.Array:
    """The logits [B,V] of the sampling distribution, float32; tokens filtered out get `FILTERED`.

    A row of temperature 0 keeps its most likely token alone (the first, of several).
    """
    logits = logits_bv.astype(jnp.float32)
    greedy = (settings.temperature == 0)[:, None]
    best = jnp.arange(logits.shape[1])[None] == jnp.argmax(logits, axis=-1)[:, None]
    # The greatest becomes 0 first: a division of large logits would round away what differs.
    scores = logits - jnp.max(logits, axis=-1, keepdims=True)
    scores = scores / jnp.where(greedy, 1.0, settings.temperature[:, None])
    # Greedy rows take no part in the filters, which others of the batch may ask for.
    scores = _filter(scores, settings)
    return jnp.where(greedy, jnp.where(best, 0.0, FILTERED), scores)


@flax.struct.dataclass
class Sampled:
    """Tokens [B] and their log-probabilities [B] in nats, float32.

    `logprobs` under the model's own distribution (temperature 1, no filter: what training
    computes), `sampling_logprobs` under the one they were drawn from (0 where greedy).
    """

    tokens: jax.Array
    logprobs: jax.Array
    sampling_logprobs: jax.Array


def sample(logits_bv: jax.Array, settings: SamplingArrays, keys_b: jax.Array) -> Sampled:
    """Draws a token a row; `keys_b` [B] are the rows' own keys, so that rows do not mix."""
    logits = logits_bv.astype(jnp.float32)
    best, best_logprob = most_likely(logits)

    def draw(logits):
        scores = process(logits, settings)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys_b)
        chosen = jnp.argmax(jnp.where(scores > FILTERED, scores + noise, FILTERED), axis=-1)
        chosen = jnp.where(settings.temperature == 0, best, chosen.astype(jnp.int32))
        drawn = _pick(jax.nn.log_softmax(scores, axis=-1), chosen)
        return Sampled(chosen, token_logprobs(logits, chosen), drawn)

    def take(logits):
        return Sampled(best, best_logprob, jnp.zeros(logits.shape[0], jnp.float32))

    return jax.lax.cond(jnp.any(settings.temperature > 0), draw, take, logits)


def token_logprobs(logits_bv: jax.Array, tokens_b: jax.Array) -> jax.Array:
    """The log-probability [B] of each row's token under the logits' softmax, float32 nats."""
    logits = logits_bv.astype(jnp.float32)
    return _pick(logits, tokens_b) - jax.nn.logsumexp(logits, axis=-1)


def _pick(x_bv: jax.Array, index_b: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_bv, index_b[:, None], axis=1)[:, 0]
