"""Which draft tokens the full model agrees to, and the token of its own behind them.

Sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): with q the draft's and
p the full model's distribution, both after temperature and filters, a draft token x is accepted
with probability min(1, p(x) / q(x)); the first that is not is replaced by a draw from
max(0, p - q), normalised; behind K accepted ones a token is drawn from p. Every token then has the
distribution p. The draws of token number n follow from the row's key and n alone, and a draft that
is thrown away has decided nothing, so that its number's draws may be used again.

Greedy, a draft token is accepted where it is the full model's most likely one.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxreason.nn.kernels.decode import best as most_likely
from jaxreason.rollout.sampling import FILTERED, SamplingArrays, process, token_logprobs

# What a token's draws are for; folded into its key.
DRAFT, ACCEPT, REPLACE = 1, 2, 3


@flax.struct.dataclass
class Verified:
    """The full model's word: the first `accepted` [B] drafts and one more of `tokens` [B,K+1] are
    to be taken, with their log-probabilities."""

    tokens: jax.Array
    accepted: jax.Array
    logprobs: jax.Array
    sampling_logprobs: jax.Array


def folded(keys_b: jax.Array, numbers: jax.Array, purpose: int) -> jax.Array:
    """Keys for tokens `numbers` [B,...] of rows with `keys_b` [B], of one purpose."""

    def one(key, number):
        return jax.random.fold_in(jax.random.fold_in(key, number), purpose)

    for _ in range(numbers.ndim - 1):
        one = jax.vmap(one, (None, 0))
    return jax.vmap(one)(keys_b, numbers)


def draw(weights_bv: jax.Array, keys_b: jax.Array) -> jax.Array:
    """A token a row [B], in proportion to non-negative weights."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, weights_bv.shape[1:]))(keys_b)
    scores = jnp.where(weights_bv > 0, jnp.log(weights_bv) + noise, FILTERED)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def verify(
    logits_btv: jax.Array,
    drafted_bk: jax.Array,
    number_b: jax.Array,
    q: Any,
    settings: SamplingArrays,
    keys_b: jax.Array,
    count_b: jax.Array,
) -> Verified:
    """Compares drafts with the full model's logits [B,K+1,V], the last of which follow all drafts.

    A row has `number_b` [B] drafts, drawn from `q` [B,K,V] (`()`: all rows are greedy, and the most
    likely tokens were taken); `count_b` [B] is the number of its first one.
    """
    b, t, v = logits_btv.shape
    is_draft = jnp.arange(t - 1)[None] < number_b[:, None]
    flat = logits_btv.reshape(b * t, v)
    if isinstance(q, tuple):
        tokens, logprobs = (x.reshape(b, t) for x in most_likely(flat))
        accepted = _leading((drafted_bk == tokens[:, :-1]) & is_draft)
        return Verified(tokens, accepted, logprobs, jnp.zeros_like(logprobs))
    scores = process(flat, jax.tree.map(lambda s: jnp.repeat(s, t), settings))
    p = jax.nn.softmax(scores, axis=-1).reshape(b, t, v)
    numbers = count_b[:, None] + jnp.arange(t - 1)[None]
    u = jax.vmap(jax.vmap(jax.random.uniform))(folded(keys_b, numbers, ACCEPT))
    p_of, q_of = (
        jnp.take_along_axis(x, drafted_bk[..., None], axis=2)[..., 0] for x in (p[:, :-1], q)
    )
    accepted = _leading(_accepts(u, p_of, q_of) & is_draft)
    # Behind the accepted ones: what the draft gave too little. Behind all of them there is none.
    at = accepted[:, None, None]
    own = jnp.take_along_axis(p, at, axis=1)[:, 0]
    drafts = jnp.take_along_axis(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), at, axis=1)[:, 0]
    rest = jnp.maximum(own - jnp.where((accepted < number_b)[:, None], drafts, 0.0), 0.0)
    # Nothing is left only by rounding, where both are equal.
    rest = jnp.where(jnp.any(rest > 0, axis=-1, keepdims=True), rest, own)
    token = draw(rest, folded(keys_b, count_b + accepted, REPLACE))
    tokens = jnp.pad(drafted_bk, ((0, 0), (0, 1))).at[jnp.arange(b), accepted].set(token)
    logprobs = token_logprobs(flat, tokens.reshape(-1)).reshape(b, t)
    sampling = jnp.log(jnp.take_along_axis(p, tokens[..., None], axis=2)[..., 0])
    return Verified(tokens, accepted, logprobs, sampling)


def _accepts(u: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    """Whether u, uniform in [0, 1), lies below p / q."""
    return u * q < p


def _leading(agrees_bk: jax.Array) -> jax.Array:
    """How many of each row's first are all true [B]."""
    return jnp.sum(jnp.cumprod(agrees_bk.astype(jnp.int32), axis=1), axis=1)
