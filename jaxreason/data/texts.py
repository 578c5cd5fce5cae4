"""Texts on disk: each source's documents, split into train and held-out text once.

    <cache>/texts/<key>/{source}.{split}.jsonl      {"id", "text"} a line

The key hashes the sources (with their files' sizes and dates) and the split's settings. A source is
split by itself; in a mixture its train text is then freed of what is near another's held-out text.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.data import cache, chain, sources
from jaxreason.data.chain import ChainArithmetic
from jaxreason.data.config import DataConfig, Source
from jaxreason.data.dedup import SplitReport, exclude_near_duplicates, split_documents
from jaxreason.data.identity import source_identity
from jaxreason.data.sources import Document

SPLITS = ("train", "held_out")

FORMAT = 1
"""Part of every key; raise it when the same config would come to hold other texts or tokens."""

_log = logging.getLogger(__name__)


def open_texts(cfg: DataConfig, root: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """Returns the folder with the texts of all sources of `cfg` and its meta data.

    Where it is not there yet it is made below `root`. `corpus_sha256` in the meta data hashes, for
    each source, the names and texts of its train and held-out documents, in order.
    """
    parts = [source for source, _ in cfg.sources()]
    settings = {
        "sources": [source_identity(source) for source in parts],
        "held_out_fraction": cfg.held_out_fraction,
        "near_duplicate_threshold": cfg.near_duplicate_threshold,
        "dedup_train": cfg.dedup_train,
    }
    folder = root / cache.key(FORMAT, settings)

    def write(into: pathlib.Path) -> dict[str, Any]:
        _log.info("splitting the texts of %d sources into %s", len(parts), folder)
        reports = [_write_split(into, s, source, cfg) for s, source in enumerate(parts)]
        dropped = [0] * len(parts)
        if len(parts) > 1:
            dropped = [_drop_held_out_elsewhere(into, s, parts, cfg) for s in range(len(parts))]
        return {
            "settings": settings,
            "corpus_sha256": [_sha256(into, s) for s in range(len(parts))],
            "splits": [dataclasses.asdict(report) for report in reports],
            "dropped_as_held_out_in_another_source": dropped,
        }

    return folder, cache.build_once(folder, write)


def read_texts(folder: pathlib.Path, s: int, split: str) -> Iterator[Document]:
    """Yields the documents of a split ("train" or "held_out") of source number `s`."""
    return _read(_text_file(folder, s, split))


def _documents(source: Source) -> Iterator[Document]:
    if isinstance(source, ChainArithmetic):
        return chain.iter_documents(source)
    return sources.iter_documents(source)


def _threshold(source: Source, cfg: DataConfig) -> float:
    # Procedural problems share their wording; of them, only equal ones are duplicates.
    return 1.0 if isinstance(source, ChainArithmetic) else cfg.near_duplicate_threshold


def _write_split(into: pathlib.Path, s: int, source: Source, cfg: DataConfig) -> SplitReport:
    """Writes the texts of source number `s`, read twice: to split them, and to write them."""
    split = split_documents(
        _documents(source),
        held_out_fraction=cfg.held_out_fraction,
        near_duplicate_threshold=_threshold(source, cfg),
        dedup_train=cfg.dedup_train,
    )
    sides = np.zeros(split.report.documents, np.int8)
    sides[split.train], sides[split.held_out] = 1, 2
    if not len(split.train):
        raise UserError(
            f"{type(source).__name__} has no document left to train on, expected 1 or more; "
            "lower data.held_out_fraction or add text"
        )
    documents = 0
    with _writer(into, s, "train") as train, _writer(into, s, "held_out") as held_out:
        for documents, document in enumerate(_documents(source), start=1):
            side = sides[documents - 1] if documents <= len(sides) else 0
            if side:
                _write_text((train, held_out)[side - 1], document)
    if documents != len(sides):
        raise UserError(
            f"{type(source).__name__} had {len(sides)} documents, then {documents}, expected files "
            "that stay as they are; start again when they are complete"
        )
    return split.report


def _drop_held_out_elsewhere(
    into: pathlib.Path, s: int, parts: Sequence[Source], cfg: DataConfig
) -> int:
    """Drops train texts of source `s` that are near text held out from others; returns how many."""
    others = (d for t in range(len(parts)) if t != s for d in read_texts(into, t, "held_out"))
    kept = exclude_near_duplicates(
        read_texts(into, s, "train"),
        others,
        near_duplicate_threshold=_threshold(parts[s], cfg),
    )
    path, keep, count = _text_file(into, s, "train"), set(kept.tolist()), 0
    whole = path.replace(into / "whole.jsonl")
    with _writer(into, s, "train") as file:
        for count, document in enumerate(_read(whole), start=1):
            if count - 1 in keep:
                _write_text(file, document)
    whole.unlink()
    if not keep:
        raise UserError(
            f"every train text of source {s} of the mixture ({type(parts[s]).__name__}) is near "
            "one held out from another source, expected sources that differ; leave it out"
        )
    return count - len(keep)


def _text_file(folder: pathlib.Path, s: int, split: str) -> pathlib.Path:
    return folder / f"{s}.{split}.jsonl"


def _writer(folder: pathlib.Path, s: int, split: str) -> TextIO:
    return _text_file(folder, s, split).open("w", encoding="utf-8", newline="\n")


def _write_text(file: TextIO, document: Document) -> None:
    # A file's name may be no UTF-8.
    name = document.id.encode(errors="backslashreplace").decode()
    file.write(json.dumps({"id": name, "text": document.text}, ensure_ascii=False) + "\n")


def _read(path: pathlib.Path) -> Iterator[Document]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield Document(**json.loads(line))


def _sha256(folder: pathlib.Path, s: int) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split}\n".encode())
        for document in read_texts(folder, s, split):
            for part in (document.id.encode(), document.text.encode()):
                digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
