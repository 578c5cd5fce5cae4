"""Clusters of near-duplicate documents, found by locality-sensitive hashing of their signatures.

Documents that agree in a band of hashes are compared; those alike are joined, and theirs in turn.
"""

import array
import math

import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.data import minhash
from jaxreason.data.sources.document import Document

_WINDOW = 256
"""Documents of equal band that each is compared with. A larger group is linked through its chains,
which joins all that are alike but may miss a pair that nothing else connects."""

_PAIRS = 1 << 15  # signatures compared at a time


class Sketches:
    """The signatures of documents in the order they came, and the clusters of those alike."""

    def __init__(self):
        self.ids: list[str] = []
        self.sizes = array.array("q")
        self._digests = array.array("Q")
        self._rows = (bytearray(), bytearray())  # signatures by words, and by characters
        self._owners = (array.array("q"), array.array("q"))

    def add(self, document: Document) -> None:
        """Takes in the next document; its text is not kept."""
        sketch = minhash.signature(document.text)
        for kind, row in enumerate((sketch.words, sketch.characters)):
            if row is not None:
                self._rows[kind].extend(row.tobytes())
                self._owners[kind].append(len(self.ids))
        self.ids.append(document.id)
        self.sizes.append(len(document.text.encode(errors="replace")))
        self._digests.append(sketch.digest)

    def first_of_equals(self) -> np.ndarray:
        """Returns for each document the index of the first that is equal to it."""
        digests = np.array(self._digests, np.uint64)
        _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
        return first[inverse]

    def clusters(self, threshold: float) -> np.ndarray:
        """Returns a label for each document, int64: the index of one document of its cluster."""
        if not 0.5 <= threshold <= 1:
            raise UserError(
                f"near_duplicate_threshold={threshold}, expected a similarity from 0.5 to 1; "
                "0.7 is usual, 1 compares whole texts only"
            )
        parent = self.first_of_equals()
        if threshold == 1:
            return parent
        least = threshold - 2 * math.sqrt(threshold * (1 - threshold) / minhash.NUM_HASHES)
        for rows, owners in zip(self._rows, self._owners):
            signatures = np.frombuffer(rows, np.uint16).reshape(-1, minhash.NUM_HASHES)
            owner = np.array(owners, np.int64)
            distinct = parent[owner] == owner  # one of each set of equal texts
            if not distinct.all():
                signatures, owner = signatures[distinct], owner[distinct]
            for keys in minhash.band_keys(signatures).T:
                parent = _join_band(parent, np.ascontiguousarray(keys), signatures, owner, least)
        return parent


def _join_band(
    parent: np.ndarray, keys: np.ndarray, signatures: np.ndarray, owner: np.ndarray, least: float
) -> np.ndarray:
    """Joins the clusters of documents that agree in a band and are alike; returns the parents.

    `parent` is flat on entry and on return: parent[parent] == parent.
    """
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    at = np.arange(len(keys))
    for step in range(1, _WINDOW + 1):
        at = at[: np.searchsorted(at, len(keys) - step)]
        at = at[keys[at] == keys[at + step]]  # equal keys stand together: `at` only shrinks
        if not len(at):
            break
        a, b = order[at], order[at + step]
        apart = parent[owner[a]] != parent[owner[b]]
        a, b = a[apart], b[apart]
        alike = np.concatenate(
            [np.empty(0, bool)]
            + [
                minhash.similarity(signatures[a[i : i + _PAIRS]], signatures[b[i : i + _PAIRS]])
                >= least
                for i in range(0, len(a), _PAIRS)
            ]
        )
        if alike.any():
            parent = _unite(parent, owner[a[alike]], owner[b[alike]])
    return parent


def _unite(parent: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns flat parents after joining a[i] with b[i]; a root is its cluster's least index."""
    for x, y in zip(a.tolist(), b.tolist()):
        x, y = _root(parent, x), _root(parent, y)
        parent[max(x, y)] = min(x, y)
    while not np.array_equal(parent, up := parent[parent]):
        parent = up
    return parent


def _root(parent: np.ndarray, node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return int(node)
