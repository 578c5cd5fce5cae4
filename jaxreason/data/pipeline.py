"""Batches of a planned corpus: `batch(step)` is a pure function, and `iterate` only prefetches.

A global batch is rows step * B .. step * B + B - 1 of the plan; host p of n takes the p-th block of
B / n of them. Nothing else has state, so a run resumed at a step, on any number of hosts, goes on
with the very rows that it would have had.
"""

import functools
from collections.abc import Generator, Sequence

import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.core.text import Tokenizer
from jaxreason.data.config import DataConfig, Split, check
from jaxreason.data.corpus import TokenStore, combined_sha256, open_corpora
from jaxreason.data.packing import ranges
from jaxreason.data.plan import Plan

_NO_LIMIT = 2**62
_PREFETCH_THREADS = 2


class Dataset:
    """One split, as a host sees it: endless batches of `train`, or one pass over `held_out`."""

    def __init__(
        self,
        stores: Sequence[TokenStore],
        plan: Plan,
        *,
        tokenizer: Tokenizer,
        corpus_sha256: str,
        batch_size: int,
        endless: bool,
        max_batches: int | None = None,
        prefetch: int = 4,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.tokenizer = tokenizer
        """Encodes and decodes text; see core/text."""
        self.corpus_sha256 = corpus_sha256
        """Hash of the names and texts of both splits, in order."""
        self.num_rows = plan.num_rows
        """Rows in one pass over every source."""
        self.num_batches = -(-plan.num_rows // batch_size)
        """Global batches in one pass, of the held-out split at most `held_out_batches`."""
        if max_batches is not None:
            self.num_batches = min(self.num_batches, max_batches)
        self.completions_only = any(store.learned is not None for store in stores)
        """Whether only completions are learned, so that most targets have no weight."""
        self._stores, self._plan, self._endless = list(stores), plan, endless
        self._seq_len = plan.settings["seq_len"]
        self._global_rows, self._rows = batch_size, batch_size // process_count
        self._first_row, self._prefetch = process_index * self._rows, prefetch
        # Documents are numbered over all sources, in their order.
        self._first_document = np.cumsum([0] + [len(s.offsets) - 1 for s in self._stores])

    @property
    def plan_sha256(self) -> str:
        """Hash of the plan: runs with equal corpus and plan read the same rows."""
        return self._plan.sha256

    @functools.cached_property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the split's documents for each target; nats a target / this = nats a byte.

        A document of n tokens has n targets: its tokens but the first, and the end of the sequence.
        Where only completions are learned, both numbers are theirs.
        """
        targets = sum(_targets(s) for s in self._stores)
        return sum(s.utf8_bytes for s in self._stores) / max(targets, 1)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Returns this host's rows of global batch `step` (from 0), each field [B / hosts, T].

        `tokens`, `targets`, `positions`, `segment_ids`, `example_id` are int32, `loss_weights`
        float32. A segment is a span of one document; positions restart at 0 in each. Targets follow
        the document beyond the row's end; the weight is 0 only after a document's last token and in
        padding, where segment_ids is 0 and example_id -1. IndexError past a single pass's end.
        Where only completions are learned the weight is 1 on targets of theirs alone, and
        `prompt_mask` (float32) is 1 on the tokens of prompts.
        """
        if step < 0 or not (self._endless or step < self.num_batches):
            raise IndexError(f"batch {step} of {self.num_batches}")
        rows = int(step) * self._global_rows + self._first_row + np.arange(self._rows)
        if not self._endless:
            rows = rows[rows < self.num_rows]  # the last batch is filled up with padding
        size = self._rows * self._seq_len
        names = ("tokens", "targets", "positions", "segment_ids")
        out: dict[str, np.ndarray] = {name: np.zeros(size, np.int32) for name in names}
        out["loss_weights"] = np.zeros(size, np.float32)
        out["example_id"] = np.full(size, -1, np.int32)
        if self.completions_only:
            out["prompt_mask"] = np.zeros(size, np.float32)
        for source, places, spans in self._plan.spans(rows):
            store = self._stores[source]
            at = ranges(places[spans.row] * self._seq_len + spans.column, spans.length)
            token = ranges(store.offsets[spans.document] + spans.start, spans.length)
            last = np.repeat(store.offsets[spans.document + 1] - 1, spans.length)
            goes_on = token < last
            first_of_row = np.searchsorted(spans.row, spans.row)
            out["tokens"][at] = store.tokens[token]
            out["targets"][at] = np.where(goes_on, store.tokens[np.minimum(token + 1, last)], 0)
            out["loss_weights"][at] = goes_on
            if store.learned is not None:
                out["loss_weights"][at] *= store.learned[np.minimum(token + 1, last)]
                out["prompt_mask"][at] = ~store.learned[token]
            out["positions"][at] = ranges(np.zeros_like(spans.length), spans.length)
            segment = np.arange(len(spans.row)) - first_of_row + 1
            out["segment_ids"][at] = np.repeat(segment, spans.length)
            example = self._first_document[source] + spans.document
            out["example_id"][at] = np.repeat(example, spans.length)
        return {name: values.reshape(self._rows, self._seq_len) for name, values in out.items()}

    def iterate(
        self, start_step: int = 0, stop_step: int | None = None
    ) -> Generator[tuple[int, dict[str, np.ndarray]]]:
        """Yields (step, batch(step)) for start_step <= step < stop_step, made ahead by threads.

        stop_step None: for ever, or to the end of a single pass.
        """
        end = _NO_LIMIT if self._endless else self.num_batches
        stop = end if stop_step is None else min(stop_step, end)
        if start_step >= stop:
            return
        if not self._prefetch:
            for step in range(start_step, stop):
                yield step, self.batch(step)
            return
        import grain  # here, so that batch() alone needs NumPy only

        steps = grain.MapDataset.range(start_step, stop)
        options = grain.ReadOptions(
            num_threads=min(_PREFETCH_THREADS, self._prefetch), prefetch_buffer_size=self._prefetch
        )
        yield from steps.map(lambda step: (step, self.batch(step))).to_iter_dataset(options)


def _targets(store: TokenStore) -> int:
    if store.learned is None:
        return len(store.tokens) - (len(store.offsets) - 1)
    return int(store.learned.sum() - store.learned[store.offsets[:-1]].sum())


def build(
    cfg: DataConfig, *, split: Split, process_index: int = 0, process_count: int = 1
) -> Dataset:
    """Returns a split of the data set, tokenised into the cache first where it is not there yet.

    `train` is endless, in an order keyed by `cfg.seed`; `held_out` is one pass in one fixed order,
    the same for every seed. Raises UserError for a config or a corpus that gives no batch.
    """
    check(cfg, process_count)
    parts = cfg.sources()
    tokenizer, corpora = open_corpora(cfg)
    train = split == "train"
    stores = [c.train if train else c.held_out for c in corpora]
    if not any(len(s.tokens) for s in stores):
        raise UserError(
            f"no held-out documents at data.held_out_fraction={cfg.held_out_fraction}, "
            "expected 1 or more; raise the fraction"
        )
    plan = Plan(
        [np.diff(s.offsets) for s in stores],
        seq_len=cfg.seq_len,
        packing=cfg.packing,
        seed=cfg.seed if train else 0,
        weights=[weight for _, weight in parts] if train else None,
    )
    if train:
        _check_size(cfg, stores, plan)
    return Dataset(
        stores,
        plan,
        tokenizer=tokenizer,
        corpus_sha256=combined_sha256([c.sha256 for c in corpora]),
        batch_size=cfg.batch_size,
        endless=train,
        max_batches=None if train else cfg.held_out_batches,
        prefetch=cfg.prefetch,
        process_index=process_index,
        process_count=process_count,
    )


def _check_size(cfg: DataConfig, stores: Sequence[TokenStore], plan: Plan) -> None:
    for (source, _), store in zip(cfg.sources(), stores, strict=True):
        if len(store.tokens) < cfg.seq_len:
            raise UserError(
                f"{type(source).__name__} has {len(store.tokens)} train tokens, expected "
                f"data.seq_len={cfg.seq_len} or more; lower data.seq_len or add text"
            )
    if plan.num_rows < cfg.batch_size:
        raise UserError(
            f"the train split fills {plan.num_rows} rows of data.seq_len={cfg.seq_len}, expected "
            f"data.batch_size={cfg.batch_size} or more; lower either, or add text"
        )
