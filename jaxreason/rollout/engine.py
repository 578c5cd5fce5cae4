"""Generation: prompts enter free slots of a cache, are decoded together, and make room.

The device draws tokens in chunks (`slots`); between chunks the host turns them into text, looks for
stop strings, streams, and refills. A request's tokens depend on its prompt, its settings and the
seed; which slot it gets and what else runs changes nothing (up to the rounding of another batch
size).
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core import rng
from jaxreason.core.errors import UserError
from jaxreason.core.precision import as_dtype
from jaxreason.rollout import slots as device
from jaxreason.rollout.reply import Reply
from jaxreason.rollout.requests import (
    Completion,
    Delta,
    Request,
    check_request,
    encode_prompts,
)
from jaxreason.rollout.sampling import Sampling, stack_settings
from jaxreason.rollout.stats import Stats

HEADROOM = 256  # Tokens beyond the longest prompt that a cache starts with; then it doubles.
PIECE = 512  # Longer prompts are read in pieces: attention scores of a whole one may not fit.
MIN_BUCKET = 16
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
        )
        for i, tokens in enumerate(encode_prompts(model, prompts))
        for j in range(n)
    ]
    done = run(model, requests, seed=seed, slots=slots, stream=stream, cancel=cancel, stats=stats)
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
    stream: Callable[[Delta], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    stats: Stats | None = None,
) -> list[Completion]:
    """Serves requests of different lengths and settings; completions come back in their order.

    `chunk` is the number of tokens between two looks of the host; it changes no result.
    """
    if slots < 1:
        raise UserError(f"slots is {slots}; expected at least 1")
    for request in requests:
        check_request(request, model)
    if not requests:
        return []
    if chunk is None:
        watched = stream is not None or any(r.stop for r in requests)
        chunk = 4 if watched else 16
    engine = _Engine(
        prepare(model, min(slots, len(requests))), requests, seed, slots, chunk, stats or Stats()
    )
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


def bucket(tokens: int, least: int = MIN_BUCKET) -> int:
    """The power of two that holds `tokens`: few lengths, few programs."""
    return max(least, 1 << (tokens - 1).bit_length())


def row_groups(rows: int) -> Iterable[int]:
    """Powers of four that add up to `rows`: few batch sizes of prompts, none with idle rows."""
    size = 4 ** ((max(rows, 1).bit_length() - 1) // 2)
    while rows:
        while size > rows:
            size //= 4
        yield size
        rows -= size


class _Engine:
    """One call of `run`: which request sits in which slot, and the device's state."""

    def __init__(self, model, requests, seed: int, slots: int, chunk: int, stats: Stats):
        self._model, self._requests, self._chunk, self._stats = model, requests, chunk, stats
        self._cfg, self._dtype = model.config, model.dtype
        self._size = min(slots, len(requests))
        self._queue = collections.deque(range(len(requests)))
        self._waiting = collections.Counter(r.tokens for r in requests)
        self._slots: list[int | None] = [None] * self._size
        self._replies = [Reply(model.tokenizer, model.eos_ids, r) for r in requests]
        self._prompts: dict[tuple[int, ...], tuple[Any, Any, int]] = {}
        self._key = rng.named(rng.base_key(seed), "sample")
        self._eos = jnp.asarray(model.eos_ids or (-1,), jnp.int32)
        longest = max(len(r.tokens) for r in requests)
        self._capacity = bucket(min(self._need(range(len(requests))), longest + HEADROOM))
        self._state = None
        self._touched: dict[int, None] = {}

    @property
    def working(self) -> bool:
        return bool(self._queue) or any(s is not None for s in self._slots)

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
        entering = {}
        while free and self._queue:
            entering[free.pop(0)] = self._queue.popleft()
        if not entering:
            return
        with self._stats.timed("prefill"):
            if self._state is None:
                self._state = device.empty_slots(self._cfg, self._size, self._capacity, self._dtype)
            self._read_prompts(entering.values())
            by_source = collections.defaultdict(list)
            for slot, i in entering.items():
                cache, logits, row = self._prompts[self._requests[i].tokens]
                by_source[id(cache)].append((cache, logits, row, slot, i))
            for group in by_source.values():
                self._admit(group)
        for i in entering.values():
            tokens = self._requests[i].tokens
            self._waiting[tokens] -= 1
            if not self._waiting[tokens]:
                del self._prompts[tokens]

    def _read_prompts(self, indices: Iterable[int]) -> None:
        """Runs the prompts that are not read yet, equal ones once, those of a size together."""
        groups = collections.defaultdict(list)
        for tokens in dict.fromkeys(self._requests[i].tokens for i in indices):
            if tokens not in self._prompts:
                groups[bucket(len(tokens))].append(tokens)
        for size, prompts in groups.items():
            for rows in row_groups(len(prompts)):
                self._read(prompts[:rows], size)
                prompts = prompts[rows:]

    def _read(self, prompts: Sequence[tuple[int, ...]], size: int) -> None:
        rows = np.zeros((len(prompts), size), np.int32)
        for row, tokens in zip(rows, prompts):
            row[: len(tokens)] = tokens
        lengths = np.array([len(tokens) for tokens in prompts], np.int32)
        cache, logits = device.empty_prompts(self._cfg, len(prompts), size, self._dtype)
        piece = min(size, PIECE)
        for start in range(0, int(lengths.max()), piece):
            counts = np.clip(lengths - start, 0, piece)
            cache, logits = device.extend(
                self._model.params, cache, logits, rows[:, start : start + piece], counts,
                cfg=self._cfg, dtype=self._dtype, empty=start == 0,
            )  # fmt: skip
        for row, tokens in enumerate(prompts):
            self._prompts[tokens] = cache, logits, row
        self._stats.prefill_tokens += int(lengths.sum())

    def _admit(self, group: Sequence[tuple]) -> None:
        indices = [i for *_, i in group]
        requests = [self._requests[i] for i in indices]
        spare = self._size - len(group)

        def array(values: Iterable, dtype: Any = np.int32) -> Any:
            return np.array([*values, *[0] * spare], dtype)

        entrants = device.Entrants(
            number=jnp.int32(len(group)),
            source=array(row for _, _, row, _, _ in group),
            slot=array(slot for _, _, _, slot, _ in group),
            prompt_index=array(r.prompt_index for r in requests),
            sample_index=array(r.sample_index for r in requests),
            limit=array(r.max_new_tokens for r in requests),
            ignore_eos=array((r.ignore_eos for r in requests), bool),
            sampling=stack_settings([r.sampling for r in requests] + [Sampling()] * spare),
        )
        cache, logits = group[0][:2]
        self._state, drawn = device.admit(
            self._state, cache, logits, entrants, self._key, self._eos
        )
        drawn = jax.device_get(drawn)
        for place, (_, _, _, slot, i) in enumerate(group):
            self._slots[slot] = i
            self._touched[i] = None
            self._replies[i].add(
                drawn.tokens[place], drawn.logprobs[place], drawn.sampling_logprobs[place]
            )
        self._release()

    # Tokens.

    def decode(self) -> None:
        """Draws a chunk of tokens in every slot that holds a request."""
        active = [i for i in self._slots if i is not None]
        if not active:
            return
        with self._stats.timed("decode"):
            need = self._need(active, self._chunk)
            if need > self._capacity:
                self._capacity = bucket(need)
                self._state = device.grow(self._state, self._capacity)
            self._state, decoded = device.decode(
                self._model.params, self._state, self._eos, jnp.bool_(bool(self._queue)),
                cfg=self._cfg, dtype=self._dtype, chunk=self._chunk,
            )  # fmt: skip
            decoded = jax.device_get(decoded)
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
