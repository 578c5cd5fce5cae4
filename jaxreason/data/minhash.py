"""Signatures of texts that agree about as often as the texts' shingles overlap (MinHash).

A text is reduced to 256 bytes, so near-duplicates are found among millions of documents without
holding them. Broder, "On the resemblance and containment of documents" (1997); the numbers of
hashes, bands and rows are reconstructed.
"""

import hashlib
from typing import NamedTuple

import numpy as np

NUM_HASHES = 128
"""Hashes in a signature: an estimate of similarity s has deviation sqrt(s (1 - s) / 128)."""
NUM_BANDS = 32
"""Bands of 4 hashes: texts of similarity 0.7 share one with probability 0.9998; of 0.4, 0.56."""
WORDS = 5
"""Words in a shingle of a long text."""
CHARACTERS = 8
"""Characters in a shingle of a short text, or of one that has hardly any spaces."""

# Between the two numbers a text has signatures of both kinds, so that two near-duplicates on
# different sides of a limit still meet.
_SHORT_WORDS = (40, 80)
_LONG_WORD_BYTES = (24, 32)

_PRIME = np.uint64(0x100000001B3)
_INVERSE = np.uint64(pow(0x100000001B3, -1, 1 << 64))
_COLUMNS = 1024  # shingles hashed at a time: the block of 128 x 1024 words stays in the cache


class Signature(NamedTuple):
    """What is kept of a text."""

    digest: int
    """Hash of the normalised text, 64 bits: equal for texts that differ in case or spacing only."""
    words: np.ndarray | None
    """uint16[NUM_HASHES] over shingles of words, or None."""
    characters: np.ndarray | None
    """uint16[NUM_HASHES] over shingles of characters, or None; long texts have none."""


def signature(text: str) -> Signature:
    """Returns the signature of `text`, equal on every machine."""
    data = " ".join(text.lower().split()).encode(errors="replace")
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
    letters = np.frombuffer(data, np.uint8)
    ends = np.append(np.flatnonzero(letters == ord(" ")), len(letters))
    starts = np.append(0, ends[:-1] + 1)
    count, length = len(starts), len(letters) / len(starts)
    by_word = by_character = None
    if count >= _SHORT_WORDS[0] and length <= _LONG_WORD_BYTES[1]:
        by_word = _minima(_hash_spans(letters, starts[: 1 - WORDS], ends[WORDS - 1 :]))
    if count < _SHORT_WORDS[1] or length > _LONG_WORD_BYTES[0]:
        starts = np.flatnonzero((letters & 0xC0) != 0x80)  # where a character of UTF-8 starts
        ends = np.append(starts[CHARACTERS:], len(letters))
        starts = starts[: len(ends)] if len(starts) else np.zeros(1, np.int64)
        by_character = _minima(_hash_spans(letters, starts, ends))
    return Signature(digest, by_word, by_character)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the estimated Jaccard similarity of signatures [..., NUM_HASHES]; float64[...]."""
    return (a == b).mean(-1)


def band_keys(signatures: np.ndarray) -> np.ndarray:
    """Returns uint16[N, NUM_HASHES] as uint64[N, NUM_BANDS], equal where the bands agree."""
    return np.ascontiguousarray(signatures).view(np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    # The finaliser of splitmix64 (Steele, Lea, Flood 2014).
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash_spans(letters: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns a hash, uint32, of each span letters[starts[i]:ends[i]]."""
    # With h(n) the sum of (letter + 1) * prime**i over i < n, modulo 2**64, the span's own
    # polynomial is (h(end) - h(start)) * prime**-start.
    powers = np.full(len(letters), _PRIME)
    if len(powers):
        powers[0] = 1
    sums = np.zeros(len(letters) + 1, np.uint64)
    np.cumsum((letters.astype(np.uint64) + 1) * np.cumprod(powers), out=sums[1:])
    inverse = np.full(len(letters) + 1, _INVERSE)
    inverse[0] = 1
    polynomial = (sums[ends] - sums[starts]) * np.cumprod(inverse)[starts]
    return (_mix(polynomial ^ _mix((ends - starts).astype(np.uint64))) >> np.uint64(32)).astype(
        np.uint32
    )


_KEYS = _mix(np.arange(1, 2 * NUM_HASHES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
_MULTIPLIERS = (_KEYS[:NUM_HASHES] >> np.uint64(32)).astype(np.uint32)[:, None] | np.uint32(1)
_MASKS = (_KEYS[NUM_HASHES:] >> np.uint64(32)).astype(np.uint32)[:, None]


def _minima(shingles: np.ndarray) -> np.ndarray:
    """Returns the low 16 bits of the least value of each hash function over the shingles."""
    least = np.full(NUM_HASHES, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(shingles), _COLUMNS):
        block = shingles[None, start : start + _COLUMNS]
        least = np.minimum(least, ((block ^ _MASKS) * _MULTIPLIERS).min(1))
    return (least & np.uint32(0xFFFF)).astype(np.uint16)
