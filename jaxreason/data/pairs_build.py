"""From examples to batches: the split, what is too long, the plan of rows, the prompt's mask.

The rows are those of `data.pipeline`: `batch(step)` is a pure function, and a host reads its own.
The tokens stay in memory; a run that goes on reads and encodes its examples anew, and its facts
hold their hash.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.core.text import Tokenizer
from jaxreason.data.config import Split
from jaxreason.data.corpus import TokenStore
from jaxreason.data.pairs import Encoded
from jaxreason.data.pairs_config import PairsConfig, check
from jaxreason.data.pairs_source import Item
from jaxreason.data.pipeline import Dataset
from jaxreason.data.plan import Plan

Encode = Callable[[Item], Encoded]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Both splits, encoded; `dataset` gives their batches."""

    cfg: PairsConfig
    tokenizer: Tokenizer
    stores: dict[str, TokenStore]
    items: dict[str, list[Item]]
    """The examples of `train` and `held_out` that stand in rows, in order."""
    sha256: str
    """Hash of both splits' tokens and of what is learned of them, in order."""
    counts: dict[str, int]
    """How many examples each split has, how many were dropped and how many cut."""

    def dataset(self, split: Split, *, process_index: int = 0, process_count: int = 1) -> Dataset:
        """Returns a split's batches: `train` without end, or one pass over `held_out`."""
        cfg, store, train = self.cfg, self.stores[split], split == "train"
        plan = Plan(
            [np.diff(store.offsets)],
            seq_len=cfg.seq_len,
            packing=cfg.packing,
            seed=cfg.seed if train else 0,
            weights=[1.0] if train else None,
        )
        if train and plan.num_rows < cfg.batch_size:
            raise UserError(
                f"the {len(self.items[split])} train examples fill {plan.num_rows} rows of "
                f"data.seq_len={cfg.seq_len}, expected data.batch_size={cfg.batch_size} or more; "
                "lower either, set data.packing=none, or add examples"
            )
        return Dataset(
            [store],
            plan,
            tokenizer=self.tokenizer,
            corpus_sha256=self.sha256,
            batch_size=cfg.batch_size,
            endless=train,
            max_batches=None if train else cfg.held_out_batches,
            prefetch=cfg.prefetch,
            process_index=process_index,
            process_count=process_count,
        )

    def notes(self) -> list[str]:
        """Examples longer than a row, and a held-out part that one group makes large."""
        dropped, cut = (
            sum(self.counts[f"{split}_{what}"] for split in self.stores)
            for what in ("dropped", "truncated")
        )
        count, found = sum(map(len, self.items.values())) + dropped, []
        if dropped or cut:
            found.append(
                f"{dropped + cut} of {count} examples are longer than "
                f"data.seq_len={self.cfg.seq_len}: {dropped} left out, {cut} cut"
            )
        held, wanted = self.counts["held_out_examples"], self.cfg.held_out_fraction * count
        groups = collections.Counter(item.group or item.context for item in self.items["held_out"])
        (name, size), *_ = groups.most_common(1)
        if held > 1.5 * wanted and size > max(1, held - wanted):
            found.append(
                f"the held-out part has {held} of {count} examples, more than the {wanted:.0f} of "
                f"data.held_out_fraction, since a group stays whole: {name[:40]!r} has {size}"
            )
        return found

    def prompts(self, split: Split, count: int) -> list[list[int]]:
        """The tokens before the first completion of a split's first `count` examples with any."""
        store = self.stores[split]
        assert store.learned is not None
        found = []
        for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
            first = begin + int(np.argmax(store.learned[begin:end]))
            if len(found) < count and first > begin:
                found.append(store.tokens[begin:first].tolist())
        return found


def split_examples[T: Item](items: Sequence[T], fraction: float) -> tuple[list[T], list[T]]:
    """Returns the train and the held-out examples, each in their order.

    Groups (of examples without one: those of equal prompts) are taken in the order of their hash
    until the held-out side has `fraction` of all; so it holds one group at least. Pure: what is
    asked for the same examples anew, for an evaluation say, is the same.

    Raises:
        UserError: one side would have no example.
    """
    keys = [f"group {item.group}" if item.group else f"example {item.context}" for item in items]
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    held, wanted = set(), fraction * len(items)
    for key in sorted(sizes, key=lambda key: hashlib.sha256(key.encode()).digest()):
        if wanted <= 0:
            break
        held.add(key)
        wanted -= sizes[key]
    train = [item for item, key in zip(items, keys, strict=True) if key not in held]
    held_out = [item for item, key in zip(items, keys, strict=True) if key in held]
    if not train or not held_out:
        raise UserError(
            f"{len(items)} examples in {len(sizes)} groups leave {len(train)} for training and "
            f"{len(held_out)} held out at data.held_out_fraction={fraction}, expected both; add "
            "examples, or change the fraction"
        )
    return train, held_out


def open_pairs(
    cfg: PairsConfig,
    tokenizer: Tokenizer,
    encode: Encode,
    *,
    items: Sequence[Item] | None = None,
    process_count: int = 1,
) -> Pairs:
    """Reads, splits and encodes the examples.

    Args:
        cfg: The config.
        tokenizer: Whose ids `encode` gives.
        encode: An example's tokens and which of them are learned; a recipe knows templates.
        items: Examples to take in place of the config's source.
        process_count: How many hosts read different rows.

    Raises:
        UserError: the config, a file or an example gives no batch.
    """
    check(cfg, process_count)
    sides = dict(
        zip(
            ("train", "held_out"),
            split_examples(cfg.read() if items is None else items, cfg.held_out_fraction),
            strict=True,
        )
    )
    counts, stores, kept, digest = {}, {}, {}, hashlib.sha256()
    for split, side in sides.items():
        fitted, longer, cut = _fit([(item, encode(item)) for item in side], cfg)
        if not fitted:
            raise UserError(
                f"all {len(side)} {split} examples are longer than data.seq_len={cfg.seq_len}; "
                "raise data.seq_len"
            )
        kept[split] = [item for item, _ in fitted]
        stores[split] = store = _store([encoded for _, encoded in fitted], tokenizer)
        counts |= {f"{split}_examples": len(fitted), f"{split}_dropped": longer}
        counts |= {f"{split}_truncated": cut}
        digest.update(json.dumps([split, [item.name for item in kept[split]]]).encode())
        for values in (store.tokens, store.offsets, store.learned):
            digest.update(np.asarray(values).astype("<i8").tobytes())
    return Pairs(cfg, tokenizer, stores, kept, digest.hexdigest(), counts)


def _fit(
    found: list[tuple[Item, Encoded]], cfg: PairsConfig
) -> tuple[list[tuple[Item, Encoded]], int, int]:
    """The examples that stand in a row, how many were dropped, and how many cut."""
    longer = [item for item, encoded in found if len(encoded.tokens) > cfg.seq_len]
    if longer and cfg.too_long == "error":
        first = next(e for _, e in found if len(e.tokens) > cfg.seq_len)
        raise UserError(
            f"the example {longer[0].name or longer[0].context[:40]!r} has {len(first.tokens)} "
            f"tokens, data.seq_len is {cfg.seq_len} ({len(longer)} of {len(found)} examples are "
            "longer); raise data.seq_len, or set data.too_long to drop or truncate"
        )
    out, dropped = [], 0
    for item, encoded in found:
        if len(encoded.tokens) > cfg.seq_len:
            tokens, learned = encoded.tokens[: cfg.seq_len], encoded.learned[: cfg.seq_len]
            if cfg.too_long == "drop" or not any(learned[1:]):
                dropped += 1
                continue
            share = sum(learned) / sum(encoded.learned)
            encoded = Encoded(tokens, learned, round(share * encoded.completion_bytes))
        out.append((item, encoded))
    return out, dropped, len(longer) - dropped


def _store(found: Sequence[Encoded], tokenizer: Tokenizer) -> TokenStore:
    tokens = np.concatenate([np.asarray(encoded.tokens, np.int64) for encoded in found])
    if not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        raise UserError(
            f"the examples have tokens from {tokens.min()} to {tokens.max()}, expected 0 to "
            f"{tokenizer.vocab_size - 1}; the tokenizer's vocabulary size is wrong"
        )
    return TokenStore(
        tokens=tokens.astype(np.int32),
        offsets=np.cumsum([0] + [len(encoded.tokens) for encoded in found]),
        utf8_bytes=sum(encoded.completion_bytes for encoded in found),
        learned=np.concatenate([np.asarray(encoded.learned, bool) for encoded in found]),
    )
