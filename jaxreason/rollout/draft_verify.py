"""The device side of self-speculative decoding: drafts by some layers, verified by all of them.

A round, for every row at once:

    draft    up to K tokens, one after the other, by the draft's layers
    verify   all of them and one more position in one forward of the full model
    accept   the longest prefix that the full model agrees to, and one token of its own
    cut      the cache behind it (`KVCache.truncate`)

Rows accept different numbers: each has its own length in the cache, its own positions and its own
place in what is returned, so none waits for another's tokens, only for the round's end.

Draft by an exit at layer E (LayerSkip, arXiv 2404.16710, section 4.3): drafting stores keys and
values of the first E layers and the state at the exit for each token; the verification starts from
those states and runs the layers above. The first E layers have then seen what they would have seen
in the full model, so nothing of theirs is computed twice. By any set of layers (Draft & Verify,
arXiv 2309.08168): what a draft stored is not the full model's; the verification writes over it.

What is accepted, and why samples have the full model's distribution: `speculative_sampling`.

Greedy tokens are the full model's up to rounding. In float32, positions are summed in another order
together than one at a time: near ties of some 1e-5 nats may fall otherwise, as with another batch
size. In bfloat16 the state at the exit is rounded, where a program of the whole model need not
round the stream between layers (XLA on CPU does not): log-probabilities then differ by some 1e-2
nats, and a text may go another, equally likely way. Without an exit they agree on CPU to 1e-6.
"""

import dataclasses
import functools
import itertools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxreason.core.precision import as_dtype
from jaxreason.depth.decision import keep_wrap
from jaxreason.models import decoder
from jaxreason.nn.kernels.decode import best as most_likely
from jaxreason.nn.kv_cache import KVCache
from jaxreason.nn.layer_wrap import LayerWrap
from jaxreason.rollout.sampling import process
from jaxreason.rollout.self_speculation import DraftPlan
from jaxreason.rollout.slots import Decoded, Slots, is_eos
from jaxreason.rollout.speculative_sampling import DRAFT, draw, folded, verify


@flax.struct.dataclass
class Drafted:
    """A round's drafts: `tokens` [B,K+1], of which the first is the row's last token and `number`
    [B] follow. `states` [B,K+1,D] at the exit (or nothing), `q` [B,K,V] the distributions that the
    tokens were drawn from (nothing where greedy)."""

    cache: KVCache
    tokens: jax.Array
    number: jax.Array
    states: Any
    q: Any


def _untouched(run, x, cache):
    """A layer that is not computed."""
    routed = jax.eval_shape(run, x, cache)[2]
    return x, cache, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), routed), ()


def _first_layers(exit_layer: int) -> LayerWrap:
    """Runs the layers below the exit. For one forward over a cache, whose layers are unrolled."""
    numbers = itertools.count()

    def apply(run, x, cache, extra):
        return (*run(x, cache), ()) if next(numbers) < exit_layer else _untouched(run, x, cache)

    return LayerWrap(apply, ())


def _layers_above(exit_layer: int, states: jax.Array) -> LayerWrap:
    """Runs the layers from the exit on, beginning with `states` [B,T,D]. For one forward."""
    numbers = itertools.count()

    def apply(run, x, cache, extra):
        number = next(numbers)
        if number < exit_layer:
            # What leaves the last of them is what the exit saw.
            return _untouched(run, states if number == exit_layer - 1 else x, cache)
        return (*run(x, cache), ())

    return LayerWrap(apply, ())


def draft(params, state: Slots, eos_ids, *, cfg, dtype: str, plan: DraftPlan) -> Drafted:
    """Up to `plan.tokens` tokens for each active row, fewer before its limit or behind an end.

    With an exit, the last of a row's tokens goes through the first layers as well.
    """
    batch, exit_layer, k = state.token.shape[0], plan.exit_layer, plan.tokens
    through = int(exit_layer is not None)
    wanted = jnp.where(state.done, -through, jnp.clip(state.limit - state.count - 1, 0, k))
    tokens = jnp.zeros((batch, k + 1), jnp.int32).at[:, 0].set(state.token)
    width = (batch, k + 1, cfg.d_model)
    drafted = Drafted(
        state.cache, tokens, wanted,
        jnp.zeros(width, as_dtype(dtype)) if exit_layer is not None else (),
        jnp.zeros((batch, k, cfg.vocab_size), jnp.float32) if plan.sampled else (),
    )  # fmt: skip

    def go_on(carry):
        i, drafted = carry
        return jnp.any(i < drafted.number + through)

    def step(carry):
        i, old = carry
        running = i < old.number + through
        inputs = {
            "tokens": jax.lax.dynamic_index_in_dim(old.tokens, i, axis=1),
            "positions": old.cache.lengths[:, None],
            "segment_ids": running.astype(jnp.int32)[:, None],
        }
        if exit_layer is None:
            wrap, capture = keep_wrap(state.keep & running[:, None]), ()
        else:
            wrap, capture = _first_layers(exit_layer), (exit_layer,)
        outputs = decoder.forward(
            params, cfg, inputs, dtype=as_dtype(dtype), cache=old.cache, wrap=wrap, capture=capture
        )
        states = old.states
        if exit_layer is not None:
            states = states.at[:, i].set(outputs.captured[exit_layer][:, 0])

        def following():
            logits = decoder.logits(outputs)[:, 0]
            if not plan.sampled:
                return most_likely(logits)[0], ()
            q = jax.nn.softmax(process(logits, state.sampling), axis=-1)
            return draw(q, folded(state.keys, state.count + i, DRAFT)), q

        def none():
            return jnp.zeros(batch, jnp.int32), jnp.zeros(old.q[:, 0].shape) if plan.sampled else ()

        if through:  # The unembedding is a good part of a short draft's time.
            token, q = jax.lax.cond(jnp.any(i < old.number), following, none)
        else:
            token, q = following()
        ended = is_eos(token, eos_ids) & ~state.ignore_eos & (i < old.number)
        new = Drafted(
            outputs.cache,
            old.tokens.at[:, i + 1].set(token, mode="drop"),
            jnp.where(ended, i + 1, old.number),
            states,
            old.q.at[:, i].set(q, mode="drop") if plan.sampled else (),
        )
        return i + 1, new

    return jax.lax.while_loop(go_on, step, (jnp.int32(0), drafted))[1]


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "chunk", "plan"), donate_argnums=1)
def decode(
    params,
    state: Slots,
    eos_ids: jax.Array,
    leave_early: jax.Array,
    *,
    cfg,
    dtype: str,
    chunk: int,
    plan: DraftPlan,
) -> tuple[Slots, Decoded]:
    """Rounds of drafting and verifying in every slot that is not done, up to `chunk` tokens a row.

    Ends when another round might not fit into `chunk` (at least `plan.tokens` + 1), when all slots
    are done, or with `leave_early` when one has become so. Without
    an exit, the slots' sets of layers draft.
    """
    batch, free, k = state.token.shape[0], state.done, plan.tokens
    floats, zeros = jnp.zeros((batch, chunk), jnp.float32), jnp.zeros(batch, jnp.int32)
    decoded = Decoded(
        zeros, jnp.zeros((batch, chunk), jnp.int32), floats, floats,
        drafts=jnp.zeros((batch, 3), jnp.int32),
    )  # fmt: skip
    steps = jnp.arange(k + 1, dtype=jnp.int32)[None]

    def go_on(carry):
        state, decoded = carry
        stop = jnp.all(state.done) | (leave_early & jnp.any(state.done & ~free))
        return (jnp.max(decoded.number) + k + 1 <= chunk) & ~stop

    def round_(carry):
        state, decoded = carry
        active, before = ~state.done, state.cache.lengths
        drafted = draft(params, state, eos_ids, cfg=cfg, dtype=dtype, plan=plan)
        number = jnp.maximum(drafted.number, 0)
        inputs = {
            "tokens": drafted.tokens,
            "positions": before[:, None] + steps,
            "segment_ids": (active[:, None] & (steps <= number[:, None])).astype(jnp.int32),
        }
        wrap = None
        if plan.exit_layer:
            wrap = _layers_above(plan.exit_layer, drafted.states)
        outputs = decoder.forward(
            params, cfg, inputs, dtype=as_dtype(dtype), cache=drafted.cache.truncate(before),
            wrap=wrap,
        )  # fmt: skip
        found = verify(
            decoder.logits(outputs), drafted.tokens[:, 1:], number, drafted.q, state.sampling,
            state.keys, state.count,
        )  # fmt: skip
        ends = is_eos(found.tokens.reshape(-1), eos_ids).reshape(batch, -1)
        ends &= ~state.ignore_eos[:, None]
        taken = (steps <= found.accepted[:, None]) & active[:, None]
        # Up to the first end, which a draft stops at: behind one that was accepted nothing counts.
        taken &= (jnp.cumsum(ends & taken, axis=1) - (ends & taken)) == 0
        new = jnp.sum(taken, axis=1, dtype=jnp.int32)
        last = jnp.take_along_axis(found.tokens, jnp.maximum(new - 1, 0)[:, None], axis=1)[:, 0]
        count = state.count + new
        state = dataclasses.replace(
            state, cache=outputs.cache.truncate(before + new),
            token=jnp.where(active, last, state.token), count=count,
            done=state.done | jnp.any(ends & taken, axis=1) | (count >= state.limit),
        )  # fmt: skip
        rows = jnp.arange(batch)[:, None]
        at = jnp.where(taken, decoded.number[:, None] + steps, chunk)

        def put(to, value):
            return to.at[rows, at].set(value, mode="drop")

        counts = jnp.stack([jnp.ones_like(number), number, found.accepted], axis=1)
        decoded = Decoded(
            decoded.number + new,
            put(decoded.tokens, found.tokens),
            put(decoded.logprobs, found.logprobs),
            put(decoded.sampling_logprobs, found.sampling_logprobs),
            drafts=decoded.drafts + jnp.where(active[:, None], counts, 0),
        )
        return state, decoded

    return jax.lax.while_loop(go_on, round_, (state, decoded))
