"""What a run reads: the sources, how they are split and tokenised, and how rows are filled."""

import dataclasses
import pathlib
from typing import Literal

from jaxreason.core.errors import UserError
from jaxreason.core.text import Bytes, HfJson, SentencePiece
from jaxreason.data.chain import ChainArithmetic
from jaxreason.data.packing import Packing
from jaxreason.data.sources import (
    ArrayRecords,
    JsonlFiles,
    Stdlib,
    TextFiles,
    Tfds,
    source_for_path,
)

Source = Stdlib | TextFiles | JsonlFiles | Tfds | ArrayRecords | ChainArithmetic
Split = Literal["train", "held_out"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted:
    """One source of a mixture."""

    source: Source = Stdlib()
    """Where the documents come from."""
    path: str = ""
    """A file or folder of text, read in place of `source` when not empty."""
    weight: float = 1.0
    """Share of the rows, relative to the other sources' weights; read as a decimal fraction."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set: documents, tokenizer, packing, split."""

    source: Source = Stdlib()
    """Where the documents come from."""
    path: str = ""
    """A file or folder of text, read in place of `source` when not empty."""
    mixture: tuple[Weighted, ...] = ()
    """Several sources with weights, read in place of `source` and `path` when not empty."""
    tokenizer: Bytes | SentencePiece | HfJson = Bytes()
    """How text becomes tokens; trained, where it is trained, on the train split of all sources."""
    seq_len: int = 256
    """Tokens in a row."""
    batch_size: int = 16
    """Rows in a global batch, over all hosts."""
    packing: Packing = "chop"
    """`chop`: rows cut from one long line of documents, no padding. `best_fit`: whole documents
    packed together, only those longer than a row are cut. `none`: one document (or piece) a row."""
    held_out_fraction: float = 0.03
    """Share of each source's text (in bytes, whole documents) that is kept out of training, chosen
    by a hash of the documents' names."""
    near_duplicate_threshold: float = 0.7
    """Similarity, 0.5 to 1, from which two documents are near duplicates and stay on one side of
    the split (reconstructed); 1 compares whole texts only, as always for procedural tasks."""
    dedup_train: bool = False
    """Whether of equal train texts (but for case and white space) only the first is kept."""
    held_out_batches: int | None = None
    """Batches in the pass over the held-out split; None: all of it."""
    seed: int = 0
    """Seed of the order of documents and rows; the split and the held-out order ignore it."""
    prefetch: int = 4
    """Batches made ahead by threads; 0 makes each when it is asked for."""
    cache_dir: str = ""
    """Local folder for tokenised corpora; empty: $JAXREASON_CACHE, or ~/.cache/jaxreason."""

    def sources(self) -> list[tuple[Source, float]]:
        """Returns the sources with their weights; `path` and `mixture` resolved."""
        parts = self.mixture or (Weighted(source=self.source, path=self.path),)
        return [(source_for_path(p.path) if p.path else p.source, p.weight) for p in parts]


def check(cfg: DataConfig, process_count: int = 1) -> None:
    """Raises UserError where the fields of `cfg` contradict one another or are out of range.

    `process_count` is how many hosts read different rows; the mesh decides (core.mesh.host_rows).
    """
    if cfg.mixture and cfg.path:
        raise UserError(
            f"data.path={cfg.path!r} beside data.mixture, expected one of them; "
            "put the path in a Weighted(path=...) of the mixture"
        )
    for name, least in (("seq_len", 2), ("batch_size", 1), ("prefetch", 0)):
        if getattr(cfg, name) < least:
            raise UserError(
                f"data.{name}={getattr(cfg, name)}, expected {least} or more; raise data.{name}"
            )
    if cfg.batch_size % process_count:
        raise UserError(
            f"data.batch_size={cfg.batch_size} on {process_count} hosts, expected a multiple of "
            f"{process_count}; use {max(1, cfg.batch_size // process_count) * process_count}"
        )
    if not 0 <= cfg.held_out_fraction < 1:
        raise UserError(
            f"data.held_out_fraction={cfg.held_out_fraction}, expected 0 <= fraction < 1; "
            "0.03 is a common choice"
        )
    if not 0.5 <= cfg.near_duplicate_threshold <= 1:
        raise UserError(
            f"data.near_duplicate_threshold={cfg.near_duplicate_threshold}, expected a similarity "
            "from 0.5 to 1; 0.7 is a common choice"
        )
    if cfg.held_out_batches is not None and cfg.held_out_batches < 1:
        raise UserError(
            f"data.held_out_batches={cfg.held_out_batches}, expected 1 or more; "
            "use None for the whole split"
        )
    if "://" in cfg.cache_dir:
        raise UserError(
            f"data.cache_dir={cfg.cache_dir!r} is remote, expected a local folder (token files are "
            "memory-mapped); leave it empty for the default"
        )
    cache = pathlib.Path(cfg.cache_dir).expanduser()
    if cfg.cache_dir and cache.exists() and not cache.is_dir():
        raise UserError(f"data.cache_dir={cfg.cache_dir!r} is a file, expected a folder; change it")
