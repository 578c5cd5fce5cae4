"""Splitting documents into train and held-out text that are disjoint, near-duplicates included.

Documents are read once, as a stream, some 10 MB/s a core, and only signatures are kept: 400 to 600
bytes a document with its name, so ten million documents take some 5 GB. Beyond that, split by
shard: give the held-out text as a source of its own and drop its near-duplicates from each shard of
the train text with `exclude_near_duplicates`.
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.data.clusters import Sketches
from jaxreason.data.sources.document import Document


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """What the split found and did."""

    documents: int
    """Documents read."""
    clusters: int
    """Groups of near-duplicates, those of one document included."""
    near_duplicates: int
    """Documents that share their group with another."""
    largest_cluster: int
    """Documents in the largest group."""
    dropped: int
    """Exact duplicates (but for case and white space) dropped from the train text."""
    train_bytes: int
    """UTF-8 bytes of the train text."""
    held_out_bytes: int
    """UTF-8 bytes of the held-out text."""


class Split(NamedTuple):
    """Indices into the documents in the order they were read, ascending, int64."""

    train: np.ndarray
    held_out: np.ndarray
    report: SplitReport


def split_documents(
    docs: Iterable[Document],
    *,
    held_out_fraction: float,
    seed: int = 0,
    near_duplicate_threshold: float = 0.7,
    dedup_train: bool = False,
) -> Split:
    """Splits documents so that no held-out document has a near-duplicate in the train text.

    Near-duplicates, and theirs in turn, form a cluster; whole clusters go to one side. Clusters are
    taken for the held-out side in the order of a hash of (seed, smallest document id), passing over
    what would exceed `held_out_fraction` of the bytes; where all would, the smallest is taken. So
    the split does not depend on the order of the documents.

    Two texts are near-duplicates where their estimated Jaccard similarity over shingles (5 words; 8
    characters in short texts) is above the threshold less two standard deviations of the estimate:
    a pair missed would spoil the held-out text, a pair too many costs nothing.

    Args:
        docs: Documents, read once and not kept.
        held_out_fraction: Share of the bytes to hold out, 0 <= fraction < 1; 0 holds out nothing.
        seed: Another seed holds out other documents.
        near_duplicate_threshold: Similarity from 0.5 to 1; 1 keeps only equal texts together.
        dedup_train: Whether of equal train texts (but for case and white space) only the first is
            kept.

    Raises:
        UserError: a setting is out of range, or the documents cannot be split in two.
    """
    if not 0 <= held_out_fraction < 1:
        raise UserError(
            f"held_out_fraction={held_out_fraction}, expected 0 <= fraction < 1; 0.03 is usual"
        )
    sketches = Sketches()
    for document in docs:
        sketches.add(document)
    labels = sketches.clusters(near_duplicate_threshold)
    sizes = np.array(sketches.sizes, np.int64)
    held_out = np.zeros(len(labels), bool)
    if held_out_fraction:
        held_out = np.isin(labels, _choose(sketches.ids, sizes, labels, held_out_fraction, seed))
    keep = ~held_out
    if dedup_train:
        # Equal texts are in one cluster, and so on one side.
        keep &= sketches.first_of_equals() == np.arange(len(labels))
    counts = np.unique(labels, return_counts=True)[1]
    report = SplitReport(
        documents=len(labels),
        clusters=len(counts),
        near_duplicates=int(counts[counts > 1].sum()),
        largest_cluster=int(counts.max(initial=0)),
        dropped=int((~held_out & ~keep).sum()),
        train_bytes=int(sizes[keep].sum()),
        held_out_bytes=int(sizes[held_out].sum()),
    )
    return Split(np.flatnonzero(keep), np.flatnonzero(held_out), report)


def exclude_near_duplicates(
    train: Iterable[Document],
    held_out: Iterable[Document],
    *,
    near_duplicate_threshold: float = 0.7,
) -> np.ndarray:
    """Returns the indices, int64, of the train documents that have no near-duplicate held out.

    For held-out text that is a source of its own. Clusters are as in `split_documents`, so a
    document is dropped too where only a chain of near-duplicates leads to a held-out one.
    """
    sketches = Sketches()
    for document in held_out:
        sketches.add(document)
    count = len(sketches.ids)
    for document in train:
        sketches.add(document)
    labels = sketches.clusters(near_duplicate_threshold)
    return np.flatnonzero(~np.isin(labels[count:], labels[:count]))


def _choose(
    ids: list[str], sizes: np.ndarray, labels: np.ndarray, fraction: float, seed: int
) -> list[int]:
    """Returns the labels of the clusters to hold out."""
    size: dict[int, int] = {}
    smallest: dict[int, str] = {}
    for label, document_id, document_size in zip(labels.tolist(), ids, sizes.tolist()):
        size[label] = size.get(label, 0) + document_size
        smallest[label] = min(smallest.get(label, document_id), document_id)
    if len(size) < 2:
        what = "one document" if len(ids) == 1 else f"{len(ids)} documents, all near-duplicates"
        raise UserError(
            f"the corpus is too small to split: {what if ids else 'no document'}, expected two or "
            "more that differ; add text, split its files into documents, or hold out nothing "
            "(held_out_fraction=0)"
        )

    def rank(label: int) -> tuple[bytes, str]:
        name = smallest[label]
        key = f"{seed}:{name}".encode(errors="backslashreplace")
        return hashlib.blake2b(key, digest_size=16).digest(), name

    order = sorted(size, key=rank)
    room = int(fraction * int(sizes.sum()))
    chosen = []
    for label in order:
        if size[label] <= room:
            chosen.append(label)
            room -= size[label]
    return chosen or [min(order, key=lambda label: size[label])]
