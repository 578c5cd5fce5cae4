"""Prompts that are read: their caches and last logits, and the layers that their routers chose.

Equal prompts are read once, those of one size together. Under routers of scope `everywhere` a
prompt is read in one piece, since a layer is decided from all of its tokens; otherwise long ones
are read in pieces.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxreason.depth.decision import Skipper
from jaxreason.rollout import slots as device
from jaxreason.rollout.requests import Request
from jaxreason.rollout.stats import Stats

PIECE = 512  # Longer prompts are read in pieces: attention scores of a whole one may not fit.
MIN_BUCKET = 16
# How a prompt is read: with all layers, with the model's routers watching (and deciding, under
# `everywhere`), or with the layers that the request names.
Way = Literal["plain", "routed", "given"]
Key = tuple[tuple[int, ...], Way, tuple[bool, ...] | None]


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


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Row `row` of a `cache` of prompts and of the `logits` [R,V] after their last tokens.

    `keep`: the layers that the routers chose for it, if any did.
    """

    cache: Any
    logits: jax.Array
    row: int
    keep: tuple[bool, ...] | None


class Prompts:
    """Reads the prompts of requests and holds them until the last request has used them."""

    def __init__(self, model: Any, requests: Sequence[Request], stats: Stats):
        self._model, self._requests, self._stats = model, requests, stats
        self._layers, self._depth = model.config.num_layers, model.depth
        self._read: dict[Key, Prompt] = {}
        self._waiting = collections.Counter(self._key(r) for r in requests)

    def _key(self, request: Request) -> Key:
        if request.keep is None:
            return request.tokens, "plain" if self._depth is None else "routed", None
        if request.skip_scope == "everywhere":
            return request.tokens, "given", request.keep
        return request.tokens, "plain", None

    def of(self, i: int) -> Prompt:
        """The prompt of request `i`, which has been read."""
        return self._read[self._key(self._requests[i])]

    def keep(self, i: int) -> tuple[bool, ...]:
        """The layers that run after the prompt of request `i`, which has been read."""
        given = self._requests[i].keep
        return given or self.of(i).keep or (True,) * self._layers

    def used(self, i: int) -> None:
        """Tells that request `i` needs its prompt no longer."""
        key = self._key(self._requests[i])
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._read[key]

    def read(self, indices: Iterable[int]) -> None:
        """Reads the prompts of these requests that are not read yet."""
        groups = collections.defaultdict(list)
        for key in dict.fromkeys(self._key(self._requests[i]) for i in indices):
            if key not in self._read:
                groups[bucket(len(key[0])), key[1]].append(key)
        for (size, way), keys in groups.items():
            skipper = self._depth if way == "routed" else None
            whole = skipper is not None and skipper.scope == "everywhere"
            piece = size if whole else min(size, PIECE)
            # The scores of a long prompt in one piece are large: such prompts come one by one.
            for rows in row_groups(len(keys)) if piece <= PIECE else [1] * len(keys):
                self._read_rows(keys[:rows], size, piece, skipper, way == "given")
                keys = keys[rows:]

    def _read_rows(
        self, keys: Sequence[Key], size: int, piece: int, skipper: Skipper | None, given: bool
    ) -> None:
        cfg, dtype = self._model.config, self._model.dtype
        rows = np.zeros((len(keys), size), np.int32)
        for row, (tokens, _, _) in zip(rows, keys):
            row[: len(tokens)] = tokens
        lengths = np.array([len(tokens) for tokens, _, _ in keys], np.int32)
        keep = np.array([keep for _, _, keep in keys], bool) if given else None
        cache, logits = device.empty_prompts(cfg, len(keys), size, dtype)
        reading = None
        for start in range(0, int(lengths.max()), piece):
            counts = np.clip(lengths - start, 0, piece)
            cache, logits, new = device.extend(
                self._model.params, cache, logits, rows[:, start : start + piece], counts,
                skipper, keep, cfg=cfg, dtype=dtype, empty=start == 0,
            )  # fmt: skip
            reading = new if reading is None else reading + new
        chosen = None
        if skipper is not None:
            chosen = np.asarray(device.decided(skipper, reading)).tolist()
        for row, key in enumerate(keys):
            self._read[key] = Prompt(cache, logits, row, chosen and tuple(chosen[row]))
        self._stats.prefill_tokens += int(lengths.sum())
