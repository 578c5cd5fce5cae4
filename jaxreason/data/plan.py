"""The plan: which row of which source is row 0, 1, 2, ... of a run, as a function of the config.

Rows are numbered without end. A row belongs to one source, and each source runs through its own
epochs (see packing.py). Every look-up has random access, so a run's place in its data is one
integer, and any host can find any row.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.data.packing import Packing, pack, permutation

_MAX_PERIOD = 65_536


def interleave(weights: Sequence[float]) -> np.ndarray:
    """Returns one period, int64[P], of a source per row: any prefix is within 1 row of its share.

    After n rows, for every n, source s has had more than n w_s - 1 and fewer than n w_s + 1 rows,
    w_s being its share of the weights. Row j of a source has a first and a last place that keep
    this; the earliest last place is served first, which always succeeds (R. Tijdeman, "The
    chairman assignment problem", 1980). Weights are read as decimal fractions; shares whose common
    denominator is above 65536 are rounded to multiples of 1/65536.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"mixture weight {weight}, expected a positive number; change the weight"
            )
    exact = [Fraction(str(w)) for w in weights]
    shares = [w / sum(exact) for w in exact]
    period = math.lcm(*(s.denominator for s in shares))
    if period > _MAX_PERIOD:
        period = _MAX_PERIOD
        quotas = [max(1, math.floor(s * period)) for s in shares]
        for s in sorted(range(len(shares)), key=lambda s: quotas[s] - shares[s] * period):
            quotas[s] += sum(quotas) < period
        while sum(quotas) > period:  # where the floor of 1 lifted tiny shares
            quotas[max(range(len(quotas)), key=quotas.__getitem__)] -= 1
    else:
        quotas = [int(s * period) for s in shares]
    table, had = np.empty(period, np.int64), [0] * len(quotas)
    for n in range(1, period + 1):
        ready = [s for s, q in enumerate(quotas) if had[s] < q and had[s] * period // q < n]
        table[n - 1] = min(ready, key=lambda s: -(-(had[s] + 1) * period // quotas[s]))
        had[table[n - 1]] += 1
    return table


class Plan:
    """Rows of all sources together: `locate` says which source's row a global row is."""

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        *,
        seq_len: int,
        packing: Packing,
        seed: int,
        weights: Sequence[float] | None,
    ):
        """Plans over one array of document lengths a source.

        weights: of the sources in an endless mixture; None for a single pass over every row, in one
        fixed order that mixes the sources by chance.
        """
        self.settings = {"seq_len": seq_len, "packing": packing, "seed": seed, "weights": weights}
        self.lengths = [np.asarray(n, np.int64) for n in lengths]
        self.sources = [
            pack(n, seq_len, packing, (seed, "source", s)) for s, n in enumerate(self.lengths)
        ]
        self.num_rows = sum(s.num_rows for s in self.sources)
        if weights is None:
            self._order = permutation(self.num_rows, seed, "pass")
            self._ends = np.cumsum([s.num_rows for s in self.sources])
        else:
            self._order, self._table = None, interleave(weights)
            self._quota = np.bincount(self._table, minlength=len(self.sources))
            self._rank = np.empty_like(self._table)
            for s, quota in enumerate(self._quota):
                self._rank[self._table == s] = np.arange(quota)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the source, its epoch and its row in that epoch, int64[N], of global rows."""
        rows = np.asarray(rows, np.int64)
        if self._order is not None:
            place = self._order[rows]
            source = np.searchsorted(self._ends, place, "right")
            per_epoch = np.diff(self._ends, prepend=0)
            return source, np.zeros_like(rows), place - (self._ends - per_epoch)[source]
        block, place = np.divmod(rows, len(self._table))
        source = self._table[place]
        count = block * self._quota[source] + self._rank[place]
        epoch, row = np.divmod(count, np.array([s.num_rows for s in self.sources])[source])
        return source, epoch, row

    def spans(self, rows: np.ndarray):
        """Yields (source, places, spans), where `rows[places[spans.row]]` are the spans' rows."""
        source, epoch, row = self.locate(rows)
        for s, e in sorted(set(zip(source.tolist(), epoch.tolist(), strict=True))):
            places = np.flatnonzero((source == s) & (epoch == e))
            yield s, places, self.sources[s].spans(e, row[places])

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the settings and of the first epoch's index: where every token of it stands."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        order = self._table if self._order is None else self._order
        digest.update(order.astype("<i8").tobytes())
        for s, source in enumerate(self.sources):
            digest.update(f"source {s}: {source.num_rows} rows".encode())
            for first in range(0, source.num_rows, 8192):
                rows = np.arange(first, min(first + 8192, source.num_rows))
                for values in dataclasses.astuple(source.spans(0, rows)):
                    digest.update(values.astype("<i8").tobytes())
        return digest.hexdigest()
