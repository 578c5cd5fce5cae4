"""Packing and mixing against slow oracles."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from jaxreason.core.errors import UserError
from jaxreason.data.packing import best_fit_decreasing, pack, permutation, random_bits, ranges
from jaxreason.data.plan import Plan, interleave

LENGTHS = np.array([5, 1, 17, 8, 3, 3, 40, 2, 9, 8, 8, 1, 16, 7])
PACKINGS = ["chop", "best_fit", "none"]


def _rows(packed, epoch, rows=None):
    """All spans of an epoch as {row: [(column, document, start, length)]}."""
    rows = np.arange(packed.num_rows) if rows is None else rows
    s = packed.spans(epoch, rows)
    out = {i: [] for i in range(len(rows))}
    fields = (s.row, s.column, s.document, s.start, s.length)
    for row, *span in zip(*map(np.ndarray.tolist, fields)):
        out[row].append(tuple(span))
    return out


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seq_len", [1, 4, 8, 16, 64])
def test_every_token_once_an_epoch(packing, seq_len):
    packed = pack(LENGTHS, seq_len, packing, (0, "source", 0))
    for epoch in (0, 3):
        seen = [np.zeros(n, int) for n in LENGTHS]
        for spans in _rows(packed, epoch).values():
            filled = 0
            assert spans
            for column, document, start, length in spans:
                assert column == filled and length > 0  # contiguous from the row's left edge
                filled += length
                seen[document][start : start + length] += 1
            assert filled <= seq_len
        for counts in seen:
            np.testing.assert_array_equal(counts, 1)


@pytest.mark.parametrize("packing", PACKINGS)
def test_epochs_seeds_and_sources_differ_and_rows_have_random_access(packing):
    packed = pack(LENGTHS, 8, packing, (0, "source", 0))
    whole = _rows(packed, 0)
    assert whole == _rows(pack(LENGTHS, 8, packing, (0, "source", 0)), 0)
    assert whole != _rows(packed, 1)
    assert whole != _rows(pack(LENGTHS, 8, packing, (1, "source", 0)), 0)
    assert whole != _rows(pack(LENGTHS, 8, packing, (0, "source", 1)), 0)
    picked = np.array([3, 0, 3, packed.num_rows - 1])
    assert list(_rows(packed, 0, picked).values()) == [whole[r] for r in picked]


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_are_dealt_anew_each_epoch(packing):
    """Of one long document the pieces are always the same; only their order can differ."""
    packed = pack(np.array([800]), 8, packing, (0,))
    first, second = (packed.spans(epoch, np.arange(100)).start for epoch in range(2))
    assert not np.array_equal(first, second)
    assert np.mean(np.diff(first) == 8) < 0.1  # nor is it the order of the text


def test_packed_rows_are_permuted_each_epoch():
    """Which rows hold one document and which hold two is fixed; in what order they come is not."""
    packed = pack(np.array([8, 8, 5, 3, 4, 4, 7, 1, 6, 2]), 8, "best_fit", (0,))
    shapes = [[len(row) for row in _rows(packed, epoch).values()] for epoch in range(6)]
    assert len({tuple(shape) for shape in shapes}) > 1


def test_chop_keeps_documents_in_one_line():
    """In the line of an epoch a document's tokens follow one another, whatever the row order."""
    packed = pack(LENGTHS, 8, "chop", (0,))
    assert packed.num_rows == -(-LENGTHS.sum() // 8)
    after = {}
    for spans in _rows(packed, 0).values():
        for column, document, start, length in spans:
            after[(document, start)] = (column, length)
    for (document, start), (column, length) in after.items():
        if start + length < LENGTHS[document]:  # cut only at a row's right edge
            assert column + length == 8 and after[(document, start + length)][0] == 0


def test_best_fit_cuts_only_documents_longer_than_a_row():
    packed = pack(LENGTHS, 8, "best_fit", (0,))
    spans = [s for row in _rows(packed, 0).values() for s in row]
    assert all(length == LENGTHS[d] for _, d, _, length in spans if LENGTHS[d] <= 8)
    assert all(start % 8 == 0 for _, _, start, _ in spans)
    assert packed.num_rows < pack(LENGTHS, 8, "none", (0,)).num_rows


def _slow_best_fit_decreasing(sizes, capacity):
    rooms = []
    for size in sizes:
        fits = [(room, -i) for i, room in enumerate(rooms) if room >= size]
        if fits:
            rooms[-min(fits)[1]] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_decreasing_equals_the_slow_one(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(3, 40))
    sizes = np.sort(rng.integers(1, capacity + 1, int(rng.integers(1, 300))))[::-1]
    row_of = best_fit_decreasing(sizes, capacity)
    rooms = capacity - np.bincount(row_of, weights=sizes).astype(int)
    assert sorted(rooms.tolist()) == _slow_best_fit_decreasing(sizes.tolist(), capacity)


@pytest.mark.parametrize("seed", range(12))
def test_mixture_is_within_one_row_of_its_share_at_every_prefix(seed):
    rng = np.random.default_rng(seed)
    weights = [round(float(w), 2) for w in rng.uniform(0.01, 3.0, int(rng.integers(1, 7)))]
    table = interleave(weights)
    shares = np.array(weights) / sum(weights)
    rows = np.tile(table, 2)[: 2 * len(table)]
    had = np.cumsum(rows[:, None] == np.arange(len(weights)), axis=0)
    expected = np.arange(1, len(rows) + 1)[:, None] * shares
    # Shares with a common denominator are met exactly; the others within the documented rounding.
    slack = 0 if len(table) < 65_536 else len(rows) * len(weights) / 65_536
    assert np.abs(had - expected).max() < 1 + slack + 1e-9


def test_mixture_period_is_exact_for_decimal_weights():
    assert interleave([0.7, 0.2, 0.1]).size == 10
    assert interleave([1, 2]).size == 3
    with pytest.raises(UserError, match="positive"):
        interleave([1.0, 0.0])


def test_mixture_rows_run_through_each_source_in_order():
    """Row j of a source is the j-th row that `locate` gives it, through epochs of its own."""
    lengths = [np.full(5, 8), np.full(3, 8), np.full(11, 8)]
    plan = Plan(lengths, seq_len=8, packing="none", seed=0, weights=[0.5, 0.3, 0.2])
    source, epoch, row = plan.locate(np.arange(200))
    for s, n in enumerate((5, 3, 11)):
        j = np.arange(np.sum(source == s))
        np.testing.assert_array_equal(epoch[source == s], j // n)
        np.testing.assert_array_equal(row[source == s], j % n)
    some = np.array([150, 2, 77])
    for whole, part in zip((source, epoch, row), plan.locate(some)):
        np.testing.assert_array_equal(whole[some], part)
    far = 10**12  # rows a long run reaches need no table of the past
    assert plan.locate(np.array([far]))[1][0] > 10**10


def test_single_pass_visits_every_row_once():
    plan = Plan([np.full(5, 8), np.full(3, 8)], seq_len=8, packing="none", seed=0, weights=None)
    source, epoch, row = plan.locate(np.arange(plan.num_rows))
    assert sorted(zip(source.tolist(), row.tolist())) == [(0, r) for r in range(5)] + [
        (1, r) for r in range(3)
    ]
    assert not epoch.any()


def _small_plan(**changes):
    settings: dict[str, Any] = dict(seq_len=8, packing="chop", seed=0, weights=[2.0, 1.0]) | changes
    return Plan([LENGTHS, LENGTHS[:5]], **settings)


PLAN_SHA256 = {
    "chop": "8a5248fa89ecbeb078a8e31f83c8edbae45ea872112c3d71749937f1ffbcc318",
    "best_fit": "c2f87719e6415666df1b10334000c9af1772bafa87f7b4f3fa515626bfa27578",
    "none": "e50b6169d8690ef245063f072d7959f863a5352e01a174184ba123bcbe5cbc0a",
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_plan_hash_is_the_committed_one(packing):
    """A change here means: no run made before can be resumed on the same rows."""
    assert _small_plan(packing=packing).sha256 == PLAN_SHA256[packing]


def test_plan_hash_sees_what_matters():
    hashes = {
        _small_plan(**c).sha256
        for c in ({}, {"seed": 1}, {"seq_len": 9}, {"weights": [1.0, 1.0]}, {"weights": None})
    }
    assert len(hashes) == 5


def test_plan_hash_is_the_same_in_another_process():
    code = (
        "import numpy as np; from jaxreason.data.plan import Plan;"
        f"a = np.array({LENGTHS.tolist()});"
        "print(Plan([a, a[:5]], seq_len=8, packing='best_fit', seed=0, weights=[2.0, 1.0]).sha256)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == _small_plan(packing="best_fit").sha256


def test_random_bits_are_keyed_and_prefix_stable():
    bits = random_bits(100, 0, "epoch", 1)
    np.testing.assert_array_equal(bits[:10], random_bits(10, 0, "epoch", 1))
    for key in ((0, "epoch", 2), (1, "epoch", 1), (0, "other", 1)):
        assert not np.array_equal(bits, random_bits(100, *key))
    assert sorted(permutation(50, 3).tolist()) == list(range(50))


def test_ranges():
    assert ranges(np.array([3, 10, 0]), np.array([2, 0, 3])).tolist() == [3, 4, 0, 1, 2]
    assert ranges(np.array([], int), np.array([], int)).tolist() == []
