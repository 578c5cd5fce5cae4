"""Log-likelihoods of given continuations: a forward over padded batches of few shapes."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core.precision import as_dtype
from jaxreason.models import decoder

MIN_LENGTH = 16


def continuation_logprobs(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
) -> list[tuple[float, bool]]:
    """The log-likelihood of each continuation behind its context, and whether greedy gives it.

    `pairs` are (context, continuation) tokens, the context of one token at least. Of what is
    longer than `max_length` + 1 tokens the beginning is cut off. Returns nats, summed over the
    continuation, and True where every token of it is the most likely one.
    """
    rows = []
    for index, (context, continuation) in enumerate(pairs):
        whole = [*context, *continuation]
        if max_length is not None:
            whole = whole[-(max_length + 1) :]
        rows.append((index, whole, min(len(continuation), len(whole) - 1)))
    # The longest first, so that rows of a length share a batch.
    rows.sort(key=lambda row: -len(row[1]))
    results: list[Any] = [None] * len(rows)
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        length = max(MIN_LENGTH, 1 << (len(chunk[0][1]) - 2).bit_length())
        shape = (batch_size, length)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        segments, scored = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for i, (_, whole, count) in enumerate(chunk):
            n = len(whole) - 1
            tokens[i, :n], targets[i, :n], segments[i, :n] = whole[:-1], whole[1:], 1
            scored[i, n - count : n] = True
        sums, greedy = _score(
            model.params, tokens, targets, segments, scored, cfg=model.config, dtype=model.dtype
        )
        for (index, _, _), total, same in zip(chunk, np.asarray(sums), np.asarray(greedy)):
            results[index] = float(total), bool(same)
    return results


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def _score(params, tokens, targets, segments, scored, *, cfg, dtype: str):
    """Sums [B] of log-probabilities of the scored targets, and whether all were the likeliest."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    batch = {"tokens": tokens, "positions": positions, "segment_ids": segments}
    outputs = decoder.forward(params, cfg, batch, dtype=as_dtype(dtype))

    def one(row):  # A row at a time: logits of a whole batch may not fit.
        final, target, counts = row
        logits = decoder.logits(dataclasses.replace(outputs, final=final[None]))[0]
        at_target = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        logprobs = at_target - jax.nn.logsumexp(logits, axis=-1)
        same = (jnp.argmax(logits, axis=-1) == target) | ~counts
        return jnp.sum(jnp.where(counts, logprobs, 0.0)), jnp.all(same)

    return jax.lax.map(one, (outputs.final, targets, scored))
