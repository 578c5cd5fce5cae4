"""Packing: which spans of one source's documents stand in which of its rows, epoch by epoch.

A row is `seq_len` tokens. An epoch holds every token of every document exactly once; its packing is
dealt anew from random bits keyed by the epoch. Rows are looked up, never stored: kept in memory are
the documents' lengths and the permutations of one or two epochs.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
import threading
from typing import Literal

import numpy as np

Packing = Literal["chop", "best_fit", "none"]


def random_bits(count: int, *key: int | str) -> np.ndarray:
    """Returns uint64[count] random words, a pure function of `count` and `key`.

    Raw Philox words, which NumPy promises not to change (its `Generator` methods may).
    """
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    words = np.frombuffer(digest, "<u8").astype(np.uint64)
    return np.random.Philox(counter=[0, 0, *words[2:]], key=words[:2]).random_raw(count)


def permutation(count: int, *key: int | str) -> np.ndarray:
    """Returns a random permutation of 0 .. count-1, int64, a pure function of its arguments."""
    return np.argsort(random_bits(count, *key), kind="stable")


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the concatenation of start, start + 1, .. start + count - 1 over all pairs, int64."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - ends + counts, counts)


@dataclasses.dataclass(frozen=True)
class Spans:
    """Spans of documents in rows, each field int64[N], ordered by row and column."""

    row: np.ndarray
    """Which of the rows asked for, 0 for the first."""
    column: np.ndarray
    """Where in the row the span starts."""
    document: np.ndarray
    """Document of the source."""
    start: np.ndarray
    """Where in the document the span starts, in tokens."""
    length: np.ndarray
    """Number of tokens."""


class Chop:
    """All documents in one line, cut every `seq_len` tokens; the last row is padded."""

    def __init__(self, lengths: np.ndarray, seq_len: int, key: tuple[int | str, ...]):
        self._lengths, self._seq_len, self._key = lengths, seq_len, key
        self._total = int(lengths.sum())
        self.num_rows = -(-self._total // seq_len)
        self._epoch = _keep_two(self._make_epoch)

    def _make_epoch(self, epoch: int):
        order = permutation(len(self._lengths), *self._key, "epoch", epoch, "documents")
        starts = np.concatenate([[0], np.cumsum(self._lengths[order])])
        return order, starts, permutation(self.num_rows, *self._key, "epoch", epoch, "rows")

    def spans(self, epoch: int, rows: np.ndarray) -> Spans:
        """Returns the spans of `rows` (int[N], each below num_rows) of an epoch."""
        order, starts, row_order = self._epoch(epoch)
        begin = row_order[rows] * self._seq_len
        end = np.minimum(begin + self._seq_len, self._total)
        first = np.searchsorted(starts, begin, "right") - 1
        last = np.searchsorted(starts, end - 1, "right") - 1
        counts = last - first + 1
        row = np.repeat(np.arange(len(rows)), counts)
        place = ranges(first, counts)
        left = np.maximum(starts[place], begin[row])
        right = np.minimum(starts[place + 1], end[row])
        return Spans(row, left - begin[row], order[place], left - starts[place], right - left)


class Pieces:
    """Documents cut into pieces of at most `seq_len` tokens, of which a row holds one or more.

    With `best_fit` the pieces are packed best-fit-decreasing, so that only a document longer than
    a row is ever cut; otherwise a row holds one piece. Pieces of one length are interchangeable:
    the packing is found once, and an epoch deals the pieces of each length to its places anew.
    """

    def __init__(
        self, lengths: np.ndarray, seq_len: int, key: tuple[int | str, ...], best_fit: bool
    ):
        pieces_of = -(-lengths // seq_len)
        self._document = np.repeat(np.arange(len(lengths)), pieces_of)
        self._start = ranges(np.zeros_like(pieces_of), pieces_of) * seq_len
        self._length = np.minimum(lengths[self._document] - self._start, seq_len)
        self._key, self._best_fit = key, best_fit
        count = len(self._length)
        if best_fit:
            sizes = np.sort(self._length)[::-1]
            row_of_place = best_fit_decreasing(sizes, seq_len)
            self._places = np.argsort(row_of_place, kind="stable")  # places, row by row
            self._row_start = np.searchsorted(row_of_place[self._places], np.arange(count + 1))
            self.num_rows = int(row_of_place.max()) + 1 if count else 0
            self._row_start = self._row_start[: self.num_rows + 1]
            filled = np.concatenate([[0], np.cumsum(sizes[self._places])])
            row_begin = np.repeat(filled[self._row_start[:-1]], np.diff(self._row_start))
            self._column = filled[:-1] - row_begin
        else:
            self.num_rows = count
            self._places, self._column = np.arange(count), np.zeros(count, np.int64)
            self._row_start = np.arange(count + 1)
        self._epoch = _keep_two(self._make_epoch)

    def _make_epoch(self, epoch: int):
        bits = random_bits(len(self._length), *self._key, "epoch", epoch, "documents")
        # With one piece a row, any piece fits any place, whatever its length.
        by_size = self._length if self._best_fit else np.zeros_like(self._length)
        dealt = np.lexsort((bits, -by_size))
        return dealt, permutation(self.num_rows, *self._key, "epoch", epoch, "rows")

    def spans(self, epoch: int, rows: np.ndarray) -> Spans:
        """Returns the spans of `rows` (int[N], each below num_rows) of an epoch."""
        dealt, row_order = self._epoch(epoch)
        packed = row_order[rows]
        counts = self._row_start[packed + 1] - self._row_start[packed]
        at = ranges(self._row_start[packed], counts)
        piece = dealt[self._places[at]]
        return Spans(
            np.repeat(np.arange(len(rows)), counts),
            self._column[at],
            self._document[piece],
            self._start[piece],
            self._length[piece],
        )


def pack(lengths: np.ndarray, seq_len: int, packing: Packing, key: tuple) -> Chop | Pieces:
    """Returns the rows of one source: `num_rows` an epoch, and `spans(epoch, rows)`.

    lengths: tokens of each document, its end-of-sequence token included, all 1 or more.
    """
    lengths = np.asarray(lengths, np.int64)
    if packing == "chop":
        return Chop(lengths, seq_len, key)
    return Pieces(lengths, seq_len, key, best_fit=packing == "best_fit")


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row, int64[N], of each size when every size goes where it leaves least room.

    sizes: int[N] in falling order, each in 1 .. capacity. Rows are numbered as they open. Sizes are
    placed a run of equal ones at a time: the fullest row that takes one stays the fullest that
    takes the next, so it is filled at once, and so are all rows with the same room.
    """
    row_of = np.empty(len(sizes), np.int64)
    rows_with: dict[int, np.ndarray] = {}  # room left -> rows
    rooms: list[int] = []  # the keys of rows_with, sorted
    opened = 0

    def put(room: int, rows: np.ndarray):
        if room and len(rows):
            if room in rows_with:
                rows = np.concatenate([rows_with[room], rows])
            else:
                bisect.insort(rooms, room)
            rows_with[room] = rows

    begins = np.flatnonzero(np.diff(sizes, prepend=-1)).tolist() + [len(sizes)]
    for at, end in zip(begins[:-1], begins[1:], strict=True):
        size = int(sizes[at])
        while at < end:
            found = bisect.bisect_left(rooms, size)
            each = (rooms[found] if found < len(rooms) else capacity) // size
            wanted = -(-(end - at) // each)
            if found < len(rooms):
                room = rooms.pop(found)
                rows = rows_with.pop(room)
                put(room, rows[wanted:])
                rows = rows[:wanted]
            else:
                room, rows = capacity, np.arange(opened, opened + wanted)
                opened += wanted
            placed = min(end - at, each * len(rows))
            row_of[at : at + placed] = np.repeat(rows, each)[:placed]
            in_last = placed - each * (len(rows) - 1)
            put(room - each * size, rows[:-1])
            put(room - in_last * size, rows[-1:])
            at += placed
    return row_of


def _keep_two(make):
    """Returns `make` with its last two results kept (a batch may straddle two epochs)."""
    # The lock keeps prefetch threads from making the same epoch side by side.
    lock, cached = threading.Lock(), functools.lru_cache(maxsize=2)(make)

    def get(epoch: int):
        with lock:
            return cached(epoch)

    return get
