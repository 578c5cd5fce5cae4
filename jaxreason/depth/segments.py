"""Where the prompts of packed rows lie, and sums over them."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxreason.core.objective import Batch


@dataclasses.dataclass(frozen=True)
class Segments:
    """The segments of rows [B,T], numbered from 1 in each row; number 0 is padding.

    `prompt` [B,T] bool: the tokens from which a segment's layers are decided, those before its
    first completion token. What follows a completion (the next user's turn of a conversation) was
    not there when the decision was made; it obeys it.
    """

    ids: jax.Array
    prompt: jax.Array

    @property
    def valid(self) -> jax.Array:
        """Tokens [B,T] that are no padding."""
        return self.ids > 0

    def sums(self, r_bt: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sums of `r_bt`, number of tokens) a segment, [B,S] float32, over the `tokens` [B,T]."""
        # Tokens that do not count go to slot 0, which is then emptied.
        slots = jnp.where(tokens, self.ids, 0)
        count = _segment_sum(slots, tokens.astype(jnp.float32))
        return _segment_sum(slots, jnp.where(tokens, r_bt, 0.0)), count

    def mean(self, r_bt: jax.Array, tokens: jax.Array) -> jax.Array:
        """Means a segment [B,S]; 0 where it has none of the `tokens`."""
        total, count = self.sums(r_bt, tokens)
        return total / jnp.maximum(count, 1.0)

    def spread(self, of_segment: jax.Array) -> jax.Array:
        """What belongs to a segment [B,S], at each of its tokens [B,T]."""
        return jnp.take_along_axis(of_segment, self.ids, axis=1)

    def largest(self, values_bt: jax.Array) -> jax.Array:
        """The largest of a segment's int32 values [B,S]; the smallest int32 where it is empty."""
        return jax.vmap(
            lambda v, i: jax.ops.segment_max(v, i, num_segments=i.shape[0] + 1)
        )(values_bt, self.ids)  # fmt: skip

    def has_prompt(self) -> jax.Array:
        """The segments [B,S] (bool) that have a prompt token."""
        return self.sums(jnp.zeros(self.ids.shape), self.prompt)[1] > 0


def of_batch(batch: Batch) -> Segments:
    """The segments of a batch with `segment_ids` and `prompt_mask` [B,T].

    There are T + 1 slots for segments, 0 to T, since a row cannot hold more.
    """
    ids = batch["segment_ids"].astype(jnp.int32)
    prompt = (batch["prompt_mask"] > 0) & (ids > 0)
    completion = ((ids > 0) & ~prompt).astype(jnp.int32)
    so_far = jnp.cumsum(completion, axis=1)
    # Completion tokens of the row before a segment begins.
    before = jax.vmap(lambda x, i: jax.ops.segment_min(x, i, num_segments=i.shape[0] + 1))(
        so_far - completion, ids
    )
    leading = prompt & (so_far == jnp.take_along_axis(before, ids, axis=1))
    return Segments(ids, leading)


def _segment_sum(ids: jax.Array, values: jax.Array) -> jax.Array:
    def one_row(i, v):
        return jax.ops.segment_sum(v, i, num_segments=i.shape[0] + 1)

    return jax.vmap(one_row)(ids, values)
