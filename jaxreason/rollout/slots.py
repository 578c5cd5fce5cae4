"""The device side of generation: rows of a cache (slots), filled by prompts and decoded together.

    extend   reads prompts into a cache of their own and keeps the last logits
    admit    copies prompts into free slots, and draws their first tokens
    decode   draws tokens in all slots, up to a number of steps

The three programs are shared by all requests: what differs between them (settings, limits, keys,
the layers that run) is arrays. A row's draws follow from its key and the number of its token, so
neither the slot nor its neighbours matter.
Where layers may be skipped, a slot has its set of them, and `decode` is one program for all sets:
each layer stands in a conditional, which writes the cache where it lies and copies none of it
(docs/log.md). Where none may be, there is no conditional.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from jaxreason.core.precision import as_dtype
from jaxreason.depth.decision import Reading, Skipper, decide, keep_wrap, read_wrap
from jaxreason.models import decoder
from jaxreason.nn.kernels import decode as kernels
from jaxreason.nn.kv_cache import KVCache
from jaxreason.rollout.sampling import Sampled, SamplingArrays, sample


@flax.struct.dataclass
class Slots:
    """The state of B slots between programs.

    `token` [B] is the last one drawn, which is not in the cache yet; `count` [B] those drawn so
    far, `limit` [B] the most there may be; a slot that is `done` [B] is free. `keys` [B]. `keep`
    [B,L] bool: the layers that run (None: always all).
    """

    cache: KVCache
    token: jax.Array
    count: jax.Array
    limit: jax.Array
    done: jax.Array
    ignore_eos: jax.Array
    keys: jax.Array
    sampling: SamplingArrays
    keep: jax.Array | None = None


@flax.struct.dataclass
class Entrants:
    """Requests that enter slots: arrays [B], of which the first `number` hold one.

    Prompt `source` goes into slot `slot`, with the layers `keep` [B,L] where the slots have any.
    """

    number: jax.Array
    source: jax.Array
    slot: jax.Array
    prompt_index: jax.Array
    sample_index: jax.Array
    limit: jax.Array
    ignore_eos: jax.Array
    sampling: SamplingArrays
    keep: jax.Array | None = None


def prepare_params(params, cfg, dtype, rows: int):
    """Parameters as the token loop over `rows` rows wants them: one tree a layer, cast once.

    On CPU in the layout of `nn.kernels.decode`, where a float32 loop keeps weights in bfloat16 if
    that changes none. Those of a prepared model come back as they are.
    """
    if isinstance(params["blocks"], tuple) and "qkv" in params["blocks"][0]["attn"]:
        return params
    narrow = jnp.dtype(dtype) == jnp.float32 and decoder.resolve(cfg).kernels == "cpu"
    narrow = narrow and bool(kernels.held_by_bfloat16(params, tied=cfg.tie_embeddings))
    prepared = _prepare(params, cfg=cfg, dtype=jnp.dtype(dtype).name, rows=rows, narrow=narrow)
    table = prepared.get("unembed")
    if cfg.tie_embeddings and isinstance(table, kernels.OutIn) and len(table.pieces) == 1:
        # A compiled program returns an array that has two names as two.
        prepared = {**prepared, "embed": table.pieces[0]}
    return prepared


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "rows", "narrow"))
def _prepare(params, *, cfg, dtype: str, rows: int, narrow: bool):
    params = decoder.unstack(decoder.cast(params, as_dtype(dtype)))
    if decoder.resolve(cfg).kernels == "cpu":
        tied, to = cfg.tie_embeddings, as_dtype(dtype)
        return kernels.prepare(params, tied=tied, dtype=to, rows=rows, narrow=narrow)
    return {**params, "embed": params["embed"].astype(dtype)}


@functools.partial(jax.jit, static_argnames=("cfg", "batch", "capacity", "dtype", "skips"))
def empty_slots(cfg, batch: int, capacity: int, dtype: str, skips: bool = False) -> Slots:
    """`batch` free slots of `capacity` tokens; with `skips`, each has a set of layers."""
    zeros = jnp.zeros(batch, jnp.int32)
    return Slots(
        cache=decoder.init_cache(cfg, batch, capacity, as_dtype(dtype)),
        token=zeros,
        count=zeros,
        limit=zeros,
        done=jnp.ones(batch, bool),
        ignore_eos=jnp.zeros(batch, bool),
        keys=jax.random.split(jax.random.key(0), batch),
        sampling=SamplingArrays(jnp.zeros(batch), zeros, jnp.ones(batch), jnp.zeros(batch)),
        keep=jnp.ones((batch, cfg.num_layers), bool) if skips else None,
    )


@functools.partial(jax.jit, static_argnames=("cfg", "batch", "capacity", "dtype"))
def empty_prompts(cfg, batch: int, capacity: int, dtype: str) -> tuple[KVCache, jax.Array]:
    """A cache for `batch` prompts of up to `capacity` tokens, and logits [B,V] to be filled."""
    logits = jnp.zeros((batch, cfg.vocab_size), jnp.float32)
    return decoder.init_cache(cfg, batch, capacity, as_dtype(dtype)), logits


@functools.partial(jax.jit, static_argnames="capacity")
def grow(state: Slots, capacity: int) -> Slots:
    """The slots with room for `capacity` tokens."""
    return dataclasses.replace(state, cache=state.cache.grow(capacity))


def _last_logits(outputs, last_b: jax.Array) -> jax.Array:
    """Logits [B,V] at one position a row; those of all would not fit."""
    final = jnp.take_along_axis(outputs.final, last_b[:, None, None], axis=1)
    return decoder.logits(dataclasses.replace(outputs, final=final))[:, 0]


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "empty"), donate_argnums=(1, 2))
def extend(
    params,
    cache: KVCache,
    logits: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
    skipper: Skipper | None = None,
    keep: jax.Array | None = None,
    *,
    cfg,
    dtype,
    empty: bool,
) -> tuple[KVCache, jax.Array, Reading | None]:
    """Appends the first `counts` [B] of `tokens` [B,T] to prompts, which are `empty` or not.

    Every layer runs, unless `keep` [B,L] says which, or a `skipper` of scope `everywhere` decides;
    such a skipper has to get a prompt in one piece. Returns the cache, the logits [B,V] after the
    last token (a row without new tokens keeps the `logits` that it had), and what the skipper's
    routers read.
    """
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    batch = {
        "tokens": tokens,
        "positions": cache.lengths[:, None] + steps,
        "segment_ids": (steps < counts[:, None]).astype(jnp.int32),
    }
    wrap = stored = reading = None
    if keep is not None:
        wrap, stored = keep_wrap(keep & (counts > 0)[:, None]), keep.T
    elif skipper is not None:
        wrap = read_wrap(skipper, batch["segment_ids"] > 0)
    outputs = decoder.forward(
        params, cfg, batch, dtype=as_dtype(dtype), cache=cache, cache_is_empty=empty, wrap=wrap
    )
    if wrap is not None and keep is None:
        reading = outputs.depth
        stored = reading.keep
    new = _last_logits(outputs, jnp.maximum(counts - 1, 0))
    logits = jnp.where((counts > 0)[:, None], new, logits)
    return _counted(cache, outputs.cache, counts, stored), logits, reading


def _counted(before: KVCache, after: KVCache, new_b: jax.Array, stored: jax.Array | None):
    """The cache `after` a forward that appended `new_b` [B] tokens, `stored` [L,B] being true.

    In a union, the forward stores entries for rows that skip a layer too. They are not counted:
    what follows them belongs to another stream.
    """
    if stored is None:
        return after
    return dataclasses.replace(after, valid=before.advance(new_b, stored).valid)


@jax.jit
def decided(skipper: Skipper, reading: Reading) -> jax.Array:
    """The layers [B,L] that the routers chose for prompts that are read."""
    return decide(skipper, reading)


@functools.partial(jax.jit, donate_argnums=0)
def admit(
    state: Slots,
    prompts: KVCache,
    logits: jax.Array,
    entrants: Entrants,
    base_key: jax.Array,
    eos_ids: jax.Array,
) -> tuple[Slots, Sampled]:
    """Puts prompts into free slots and draws their first tokens, which come back [B] in order.

    `eos_ids` [E] end a completion.
    """

    def copy(i, cache: KVCache) -> KVCache:
        row, slot = entrants.source[i], entrants.slot[i]
        layers = []
        for l in range(len(cache.k)):
            pairs = zip(cache.layer(l), prompts.layer(l))
            layers.append(tuple(_copy_row(to, source, row, slot) for to, source in pairs))
        return dataclasses.replace(
            cache.replace_layers(layers),
            lengths=cache.lengths.at[slot].set(prompts.lengths[row]),
            valid=cache.valid.at[:, slot].set(prompts.valid[:, row]),
        )

    cache = jax.lax.fori_loop(0, entrants.number, copy, state.cache)
    fold = jax.vmap(jax.random.fold_in)
    keys = jnp.broadcast_to(base_key[None], entrants.slot.shape)
    keys = fold(fold(keys, entrants.prompt_index), entrants.sample_index)
    first = fold(keys, jnp.zeros_like(entrants.slot))
    drawn = sample(logits[entrants.source], entrants.sampling, first)
    ended = is_eos(drawn.tokens, eos_ids) & ~entrants.ignore_eos
    used = jnp.arange(entrants.slot.shape[0]) < entrants.number
    slot = jnp.where(used, entrants.slot, used.shape[0])

    def put(to, value):
        return to.at[slot].set(value, mode="drop")

    state = Slots(
        cache=cache,
        token=put(state.token, drawn.tokens),
        count=put(state.count, jnp.ones_like(slot)),
        limit=put(state.limit, entrants.limit),
        done=put(state.done, ended | (entrants.limit <= 1)),
        ignore_eos=put(state.ignore_eos, entrants.ignore_eos),
        keys=put(state.keys, keys),
        sampling=jax.tree.map(put, state.sampling, entrants.sampling),
        keep=None if state.keep is None else put(state.keep, entrants.keep),
    )
    return state, drawn


def _copy_row(to: jax.Array, source: jax.Array, row: jax.Array, slot: jax.Array) -> jax.Array:
    """Row `row` of `source` [R,T,...] over the first T tokens of row `slot` of `to` [B,S,...]."""
    one = jax.lax.dynamic_slice_in_dim(source, row, 1)
    return jax.lax.dynamic_update_slice(to, one.astype(to.dtype), (slot, 0, 0, 0))


def is_eos(tokens: jax.Array, eos_ids: jax.Array) -> jax.Array:
    """Whether each token [B] is one of `eos_ids` [E]."""
    return jnp.any(tokens[:, None] == eos_ids[None], axis=1)


@flax.struct.dataclass
class Decoded:
    """What a call of `decode` drew: [B,chunk] each, of which a row's first `number` [B] hold.

    `computed` []: layers computed, summed over the steps, where layers may be skipped. `drafts`
    [B,3]: verifications, draft tokens and accepted ones, where drafts were made (`draft_verify`).
    """

    number: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    sampling_logprobs: jax.Array
    computed: jax.Array | None = None
    drafts: jax.Array | None = None


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "chunk"), donate_argnums=1)
def decode(
    params,
    state: Slots,
    eos_ids: jax.Array,
    leave_early: jax.Array,
    *,
    cfg,
    dtype: str,
    chunk: int,
) -> tuple[Slots, Decoded]:
    """Draws up to `chunk` tokens in every slot that is not done.

    Ends when all are done, or with `leave_early` when one has become so (others wait for a slot).
    Where slots have sets of layers, each step computes the layers that an active slot keeps.
    """
    batch = state.token.shape[0]
    floats = jnp.zeros((batch, chunk), jnp.float32)
    decoded = Decoded(
        jnp.zeros(batch, jnp.int32), jnp.zeros((batch, chunk), jnp.int32), floats, floats,
        None if state.keep is None else jnp.int32(0),
    )  # fmt: skip
    free = state.done

    def go_on(carry):
        i, state, _ = carry
        stop = jnp.all(state.done) | (leave_early & jnp.any(state.done & ~free))
        return (i < chunk) & ~stop

    def step(carry):
        i, state, decoded = carry
        active = ~state.done
        inputs = {
            "tokens": state.token[:, None],
            "positions": state.cache.lengths[:, None],
            "segment_ids": active.astype(jnp.int32)[:, None],
        }
        keep = None if state.keep is None else state.keep & active[:, None]
        outputs = decoder.forward(
            params, cfg, inputs, dtype=as_dtype(dtype), cache=state.cache,
            wrap=None if keep is None else keep_wrap(keep),
        )  # fmt: skip
        cache, computed = outputs.cache, decoded.computed
        if keep is not None:
            cache = _counted(state.cache, cache, active.astype(jnp.int32), keep.T)
            computed = computed + jnp.sum(outputs.depth, dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
        drawn = sample(decoder.logits(outputs)[:, 0], state.sampling, keys)
        token = jnp.where(active, drawn.tokens, state.token)
        count = state.count + active
        ended = is_eos(token, eos_ids) & ~state.ignore_eos
        state = dataclasses.replace(
            state, cache=cache, token=token, count=count,
            done=state.done | ended | (count >= state.limit),
        )  # fmt: skip
        decoded = Decoded(
            decoded.number + active,
            decoded.tokens.at[:, i].set(token),
            decoded.logprobs.at[:, i].set(drawn.logprobs),
            decoded.sampling_logprobs.at[:, i].set(drawn.sampling_logprobs),
            computed,
        )
        return i + 1, state, decoded

    _, state, decoded = jax.lax.while_loop(go_on, step, (jnp.int32(0), state, decoded))
    return state, decoded


@functools.partial(jax.jit, donate_argnums=0)
def free(state: Slots, slots: jax.Array) -> Slots:
    """Marks slots [B] (boolean) as free: their text was ended on the host."""
    return dataclasses.replace(state, done=state.done | slots)
