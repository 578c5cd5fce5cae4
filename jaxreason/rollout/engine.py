"""Generation: prompts enter free slots of a cache, are decoded together, and make room.

The device draws tokens in chunks (`slots`); between chunks the host turns them into text, looks for
stop strings, streams, and refills. A request's tokens depend on its prompt, its settings and the
seed; which slot it gets and what else runs changes nothing (up to the rounding of another batch
size).

Layers are skipped where the model has a `depth` (routers that choose a set of layers by prompt) or
a request brings a set. Rows of different sets either run the union of them, each keeping its own
results, or wait for others of their set. A step costs about the same for few rows as for one, so
the union is faster unless many requests share few sets.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core import rng
from jaxreason.core.errors import UserError
from jaxreason.core.precision import as_dtype
from jaxreason.depth.decision import Scope
from jaxreason.rollout import draft_verify
from jaxreason.rollout import slots as device
from jaxreason.rollout.layer_stats import Batching, LayerStats, Skipped
from jaxreason.rollout.prompts import Prompts, bucket
from jaxreason.rollout.reply import Reply
from jaxreason.rollout.requests import (
    Completion,
    Delta,
    Request,
    check_depth,
    check_request,
    encode_prompts,
)
from jaxreason.rollout.sampling import Sampling, stack_settings
from jaxreason.rollout.self_speculation import Drafts, DraftStats, SelfSpeculation
from jaxreason.rollout.stats import Stats

HEADROOM = 256  # Tokens beyond the longest prompt that a cache starts with; then it doubles.
AHEAD = 4  # Prompts a slot that `group` reads ahead, to find requests of the same set.
SAMPLE = Sampling()


def prepare(model: Any, slots: int = 8) -> Any:
    """The model with parameters as the token loop wants them (cast, one tree a layer, laid out).

    `generate` does this itself; for several calls, do it once and pass what comes back. `slots` is
    how many completions will be decoded at a time: other numbers run as well, perhaps slower.
    """
    params = device.prepare_params(model.params, model.config, as_dtype(model.dtype), slots)
    return dataclasses.replace(model, params=params)


def generate(
    model: Any,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling = SAMPLE,
    *,
    max_new_tokens: int = 256,
    n: int = 1,
    seed: int = 0,
    stop: Sequence[str] = (),
    logprobs: bool = False,
    ignore_eos: bool = False,
    keep: Sequence[bool] | None = None,
    skip_scope: Scope = "decode_only",
    batching: Batching = "union",
    speculation: SelfSpeculation | None = None,
    slots: int = 8,
    stream: Callable[[Delta], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    stats: Stats | None = None,
) -> list[Completion]:
    """Makes `n` completions of each prompt.

    Args:
        model: `models.model.Model`, or a record with its fields.
        prompts: texts, or lists of tokens (taken as they are).
        sampling: how tokens are drawn; `Sampling(temperature=0)` takes the most likely.
        max_new_tokens: most tokens a completion may have.
        n: completions a prompt; they share the reading of the prompt.
        seed: the draws' seed; with it, sample i of prompt j is always the same.
        stop: strings that end a text, which then lacks them.
        logprobs: whether to return log-probabilities.
        ignore_eos: whether to go on after an end-of-text token (for measurements).
        keep: the layers that run, one truth value a layer; None: those that the model's `depth`
            chooses by prompt, or all where it has none.
        skip_scope: with `keep`, whether prompts skip as well (`everywhere`).
        batching: `union` or `group`, where completions have different sets of layers.
        speculation: some of the layers draft tokens, and all of them verify the drafts: the text is
            the full model's. Of a model with `depth`, that is then the draft.
        slots: most completions decoded at a time.
        stream: called with new text as it comes.
        cancel: asked between chunks whether to stop everything.
        stats: gets the time spent.

    Returns:
        Completions in the order of the prompts, a prompt's samples together.

    Raises:
        UserError: a prompt or setting cannot be served.
    """
    requests = [
        Request(
            tokens=tokens,
            prompt_index=i,
            sample_index=j,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            ignore_eos=ignore_eos,
            keep=None if keep is None else tuple(map(bool, keep)),
            skip_scope=skip_scope,
        )
        for i, tokens in enumerate(encode_prompts(model, prompts))
        for j in range(n)
    ]
    done = run(
        model, requests, seed=seed, slots=slots, batching=batching, speculation=speculation,
        stream=stream, cancel=cancel, stats=stats,
    )  # fmt: skip
    if not logprobs:
        done = [dataclasses.replace(c, logprobs=None, sampling_logprobs=None) for c in done]
    return done


def run(
    model: Any,
    requests: Sequence[Request],
    *,
    seed: int = 0,
    slots: int = 8,
    chunk: int | None = None,
    batching: Batching = "union",
    speculation: SelfSpeculation | None = None,
    stream: Callable[[Delta], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    stats: Stats | None = None,
) -> list[Completion]:
    """Serves requests of different lengths and settings; completions come back in their order.

    `chunk` is the number of tokens between two looks of the host; it changes no result. Nor does
    `batching`: whether rows of different sets of layers are decoded together (`union`), or those of
    one set at a time (`group`), for which some prompts are read ahead.
    """
    if slots < 1:
        raise UserError(f"slots is {slots}; expected at least 1")
    if batching not in get_args(Batching):
        expected = ", ".join(get_args(Batching))
        raise UserError(f"batching is {batching!r}; expected one of {expected}")
    check_depth(model.depth, model.config)
    for request in requests:
        check_request(request, model)
    if not requests:
        return []
    if chunk is None:
        watched = stream is not None or any(r.stop for r in requests)
        chunk = 4 if watched else 16
    plan = None
    if speculation is not None:
        model, requests, plan = speculation.plan(model, requests)
        chunk = max(chunk, plan.tokens + 1)
    engine = _Engine(
        prepare(model, min(slots, len(requests))), requests, seed, slots, chunk,
        batching == "group", plan, stats or Stats(),
    )  # fmt: skip
    while engine.working:
        if cancel is not None and cancel():
            engine.cancel()
        else:
            engine.fill()
            engine.decode()
        for delta in engine.deltas():
            if stream is not None:
                stream(delta)
    return engine.completions()


class _Engine:
    """One call of `run`: which request sits in which slot, and the device's state."""

    def __init__(self, model, requests, seed, slots, chunk: int, grouped: bool, plan, stats):
        self._model, self._requests, self._chunk, self._stats = model, requests, chunk, stats
        self._plan = plan
        self._cfg, self._dtype = model.config, model.dtype
        self._size = min(slots, len(requests))
        self._queue = collections.deque(range(len(requests)))
        self._slots: list[int | None] = [None] * self._size
        self._replies = [Reply(model.tokenizer, model.eos_ids, r) for r in requests]
        self._prompts = Prompts(model, requests, stats)
        self._key = rng.named(rng.base_key(seed), "sample")
        self._eos = jnp.asarray(model.eos_ids or (-1,), jnp.int32)
        longest = max(len(r.tokens) for r in requests)
        self._capacity = bucket(min(self._need(range(len(requests))), longest + HEADROOM))
        self._state = None
        self._touched: dict[int, None] = {}
        self._skips = model.depth is not None or any(r.keep is not None for r in requests)
        self._grouped = grouped and self._skips
        self._ahead: list[int] = []  # Read and not in a slot: their sets of layers are known.
        self._ran: dict[int, tuple[bool, ...]] = {}  # The sets of those that entered a slot.
        self._skipped: dict[int, Skipped] = {}
        self._drafts: dict[int, Drafts] = {}
        if plan is not None:
            stats.drafts = stats.drafts or DraftStats()
        elif self._skips:
            stats.layers = stats.layers or LayerStats(num_layers=self._cfg.num_layers)
            stats.layers.batching = "group" if grouped else "union"

    @property
    def working(self) -> bool:
        return self._waiting or any(s is not None for s in self._slots)

    @property
    def _waiting(self) -> bool:
        return bool(self._queue or self._ahead)

    def completions(self) -> list[Completion]:
        return [reply.completion() for reply in self._replies]

    def deltas(self) -> Iterable[Delta]:
        """The text that is new since the last call."""
        for i in self._touched:
            if (delta := self._replies[i].take_delta()) is not None:
                yield delta
        self._touched.clear()

    def cancel(self) -> None:
        """Ends every request that has not ended."""
        for i, reply in enumerate(self._replies):
            reply.finish("cancelled")
            self._touched[i] = None
        self._queue.clear()
        self._ahead.clear()
        self._slots = [None] * self._size

    def _need(self, indices: Iterable[int], ahead: int | None = None) -> int:
        """Tokens that the fullest of these rows will have, in all or `ahead` tokens from now."""
        need = 0
        for i in indices:
            request, so_far = self._requests[i], len(self._replies[i].tokens)
            new = request.max_new_tokens if ahead is None else so_far + ahead
            need = max(need, len(request.tokens) + min(new, request.max_new_tokens))
        return need

    # Prompts.

    def fill(self) -> None:
        """Moves waiting requests into free slots."""
        free = [s for s, i in enumerate(self._slots) if i is None]
        if not (free and self._waiting):
            return
        with self._stats.timed("prefill"):
            if self._state is None:
                self._state = device.empty_slots(
                    self._cfg, self._size, self._capacity, self._dtype, self._skips
                )
            if self._grouped:
                entering = dict(zip(free, self._next_of_a_set(len(free))))
            else:
                entering = {s: self._queue.popleft() for s in free[: len(self._queue)]}
                self._prompts.read(entering.values())
            by_source = collections.defaultdict(list)
            for slot, i in entering.items():
                prompt = self._prompts.of(i)
                by_source[id(prompt.cache)].append((prompt, slot, i))
            for group in by_source.values():
                self._admit(group)
        for i in entering.values():
            self._prompts.used(i)

    def _next_of_a_set(self, number: int) -> list[int]:
        """Up to `number` requests with the set of layers that is being decoded.

        Between two sets, the one that most of the prompts read ahead have comes next.
        """
        limit = AHEAD * self._size
        if len(self._ahead) <= limit // 2:
            new = [self._queue.popleft() for _ in range(min(limit, len(self._queue)))]
            self._prompts.read(new)
            self._ahead += new
        running = [i for i in self._slots if i is not None]
        sets = collections.Counter(self._prompts.keep(i) for i in self._ahead)
        now = self._ran[running[0]] if running else sets.most_common(1)[0][0]
        chosen = [i for i in self._ahead if self._prompts.keep(i) == now][:number]
        self._ahead = [i for i in self._ahead if i not in chosen]
        return chosen

    def _admit(self, group: Sequence[tuple]) -> None:
        indices = [i for _, _, i in group]
        requests = [self._requests[i] for i in indices]
        spare = self._size - len(group)

        def array(values: Iterable, dtype: Any = np.int32) -> Any:
            return np.array([*values, *[0] * spare], dtype)

        entrants = device.Entrants(
            number=jnp.int32(len(group)),
            source=array(prompt.row for prompt, _, _ in group),
            slot=array(slot for _, slot, _ in group),
            prompt_index=array(r.prompt_index for r in requests),
            sample_index=array(r.sample_index for r in requests),
            limit=array(r.max_new_tokens for r in requests),
            ignore_eos=array((r.ignore_eos for r in requests), bool),
            sampling=stack_settings([r.sampling for r in requests] + [Sampling()] * spare),
            keep=self._sets(indices, spare) if self._skips else None,
        )
        prompt = group[0][0]
        self._state, drawn = device.admit(
            self._state, prompt.cache, prompt.logits, entrants, self._key, self._eos
        )
        drawn = jax.device_get(drawn)
        for place, (_, slot, i) in enumerate(group):
            self._slots[slot] = i
            self._touched[i] = None
            if self._plan is not None and self._stats.drafts is not None:
                layers = self._ran.get(i) or self._plan.front(self._cfg.num_layers)
                self._drafts[i] = self._stats.drafts.new(self._requests[i], layers)
            self._replies[i].add(
                drawn.tokens[place], drawn.logprobs[place], drawn.sampling_logprobs[place]
            )
        self._release()

    def _sets(self, indices: Sequence[int], spare: int) -> Any:
        """The sets of layers of requests that enter slots, and a note of them for the reports."""
        sets = [self._prompts.keep(i) for i in indices]
        for i, keep in zip(indices, sets):
            request, self._ran[i] = self._requests[i], keep
            if self._plan is not None or self._stats.layers is None:
                continue
            self._replies[i].layers = [layer for layer, kept in enumerate(keep) if kept]
            self._skipped[i] = Skipped(
                prompt_index=request.prompt_index, sample_index=request.sample_index, keep=keep
            )
            self._stats.layers.completions.append(self._skipped[i])
        return np.array(sets + [(True,) * self._cfg.num_layers] * spare)

    # Tokens.

    def decode(self) -> None:
        """Draws a chunk of tokens in every slot that holds a request."""
        active = [i for i in self._slots if i is not None]
        if not active:
            return
        before = self._stats.decode_seconds
        with self._stats.timed("decode"):
            need = self._need(active, self._chunk)
            if need > self._capacity:
                self._capacity = bucket(need)
                self._state = device.grow(self._state, self._capacity)
            how: dict[str, Any] = {"cfg": self._cfg, "dtype": self._dtype, "chunk": self._chunk}
            decode = device.decode
            if self._plan is not None:
                decode, how["plan"] = draft_verify.decode, self._plan
            self._state, decoded = decode(
                self._model.params, self._state, self._eos, jnp.bool_(self._waiting), **how
            )
            decoded = jax.device_get(decoded)
        rows = [s for s, i in enumerate(self._slots) if i is not None]
        seconds = self._stats.decode_seconds - before
        if self._stats.drafts is not None and self._plan is not None:
            counts = [(*decoded.drafts[s], decoded.number[s]) for s in rows]
            self._stats.drafts.add([self._drafts[i] for i in active], counts, seconds)
        elif self._stats.layers is not None and self._skips:
            numbers, computed = [int(decoded.number[s]) for s in rows], int(decoded.computed)
            self._stats.layers.add([self._skipped[i] for i in active], numbers, computed, seconds)
        for slot, i in enumerate(self._slots):
            if i is None:
                continue
            self._touched[i] = None
            for at in range(decoded.number[slot]):
                if not self._replies[i].finish_reason:
                    self._replies[i].add(
                        decoded.tokens[slot, at],
                        decoded.logprobs[slot, at],
                        decoded.sampling_logprobs[slot, at],
                    )
                    self._stats.decode_tokens += 1
        self._release()

    def _release(self) -> None:
        """Frees the slots of replies that ended, and tells the device of those it does not know."""
        stopped = np.zeros(self._size, bool)
        for slot, i in enumerate(self._slots):
            if i is not None and (reason := self._replies[i].finish_reason):
                self._slots[slot] = None
                stopped[slot] = reason == "stop"
        if stopped.any():
            self._state = device.free(self._state, stopped)
