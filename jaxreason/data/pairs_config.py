"""What a fine-tuning run reads: the examples, how they are split, written and packed into rows."""

import dataclasses
from typing import Literal

from jaxreason.core.errors import UserError
from jaxreason.data.pairs_source import (
    Examples,
    Item,
    PairFiles,
    check_example,
    read_pair_files,
)
from jaxreason.data.tasks import Docstrings, GsmSymbolic, docstrings, gsm_symbolic

PairSource = PairFiles | Examples | Docstrings | GsmSymbolic


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Examples of prompts with completions, or of conversations, in rows."""

    source: PairSource = PairFiles()
    """Where the examples come from."""
    path: str = ""
    """A file, folder or glob of JSON lines, read in place of `source` when not empty."""
    chat: bool = False
    """Whether a pair is written as a conversation of two messages by the model's chat template;
    otherwise prompt and completion follow one another as they are."""
    system: str = ""
    """With `chat`, the content of a system message in front of every pair; empty: none."""
    learned_turns: Literal["all", "last"] = "all"
    """Which of a conversation's assistant messages are learned."""
    seq_len: int = 512
    """Tokens in a row."""
    batch_size: int = 16
    """Rows in a global batch, over all hosts."""
    packing: Literal["best_fit", "none"] = "best_fit"
    """`best_fit`: whole examples packed together into rows. `none`: one example a row."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What becomes of an example longer than a row: the run does not start, the example is left
    out, or its end is cut off (where the prompt alone fills the row it is left out). Both are
    counted in facts.json."""
    held_out_fraction: float = 0.1
    """Share of the examples that is kept out of training: whole groups, chosen by a hash of the
    group, or of the prompt where the example has no group."""
    held_out_batches: int | None = None
    """Batches in the pass over the held-out split; None: all of it."""
    seed: int = 0
    """Seed of the order of examples and rows; the split and the held-out order ignore it."""
    prefetch: int = 4
    """Batches made ahead by threads; 0 makes each when it is asked for."""

    def read(self) -> list[Item]:
        """Returns the examples of the source, in order; UserError where it has none."""
        match PairFiles(path=self.path) if self.path else self.source:
            case PairFiles() as files:
                return read_pair_files(files)
            case Docstrings() as task:
                return list(docstrings.examples(task))
            case GsmSymbolic() as task:
                return list(gsm_symbolic.examples(task))
            case Examples(examples=()):
                raise UserError("data.source Examples has no examples; expected one or more")
            case Examples(examples=given):
                return [check_example(example) for example in given]


def check(cfg: PairsConfig, process_count: int = 1) -> None:
    """Raises UserError where `check_settings` does, or no examples are named."""
    check_settings(cfg, process_count)
    if not cfg.path and isinstance(cfg.source, PairFiles) and not cfg.source.path:
        raise UserError(
            "data.path is empty, expected a .jsonl file of examples; set --config.data.path"
        )


def check_settings(cfg: PairsConfig, process_count: int = 1) -> None:
    """Raises UserError where the fields of `cfg` contradict one another or are out of range.

    `process_count` is how many hosts read different rows; the mesh decides (core.mesh.host_rows).
    """
    for name, least in (("seq_len", 2), ("batch_size", 1), ("prefetch", 0)):
        if getattr(cfg, name) < least:
            raise UserError(
                f"data.{name}={getattr(cfg, name)}, expected {least} or more; raise data.{name}"
            )
    if cfg.system and not cfg.chat:
        raise UserError(
            "data.system is set without data.chat; set data.chat=true, or leave it empty"
        )
    if cfg.batch_size % process_count:
        raise UserError(
            f"data.batch_size={cfg.batch_size} on {process_count} hosts, expected a multiple of "
            f"{process_count}; use {max(1, cfg.batch_size // process_count) * process_count}"
        )
    if not 0 < cfg.held_out_fraction < 1:
        raise UserError(
            f"data.held_out_fraction={cfg.held_out_fraction}, expected 0 < fraction < 1; "
            "0.1 is a common choice"
        )
    if cfg.held_out_batches is not None and cfg.held_out_batches < 1:
        raise UserError(
            f"data.held_out_batches={cfg.held_out_batches}, expected 1 or more; "
            "use None for the whole split"
        )
