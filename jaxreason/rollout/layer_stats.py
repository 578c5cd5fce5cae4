"""Which layers ran in decoding, how many, and what a token took."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

Batching = Literal["union", "group"]


@dataclasses.dataclass(kw_only=True)
class Skipped:
    """One completion: its layers, and the time that its tokens after the first took."""

    prompt_index: int
    sample_index: int
    keep: tuple[bool, ...]
    tokens: int = 0
    seconds: float = 0.0
    """Wall time of the steps that it took part in, its neighbours' work included."""


@dataclasses.dataclass(kw_only=True)
class LayerStats:
    """What skipping did, over all calls that shared the record. Compiling is left out."""

    num_layers: int
    batching: Batching = "union"
    """How rows of different sets were decoded last: `union` computes the layers that any row keeps
    and masks the others' results, `group` decodes rows of one set at a time."""
    completions: list[Skipped] = dataclasses.field(default_factory=list)
    steps: int = 0
    """Steps of the token loop; a step draws a token in every active slot."""
    seconds: float = 0.0
    computed: int = 0
    """Layers computed, summed over the steps."""

    def add(self, entries: Sequence[Skipped], tokens: Sequence[int], computed: int, seconds: float):
        """Counts one call of the token loop, in which row i drew `tokens[i]`."""
        steps = max(tokens)
        self.steps += steps
        self.seconds += seconds
        self.computed += computed
        for entry, number in zip(entries, tokens, strict=True):
            entry.tokens += number
            entry.seconds += seconds * number / steps if steps else 0.0

    @property
    def distinct_sets(self) -> int:
        """Different sets of layers among the completions."""
        return len({entry.keep for entry in self.completions})

    @property
    def tokens(self) -> int:
        """Tokens that the token loop drew."""
        return sum(entry.tokens for entry in self.completions)

    @property
    def kept_per_token(self) -> float:
        """Mean number of layers that a token's own set has."""
        kept = sum(sum(entry.keep) * entry.tokens for entry in self.completions)
        return kept / max(self.tokens, 1)

    @property
    def computed_per_step(self) -> float:
        """Mean number of layers that a step computed: at least that of any of its rows."""
        return self.computed / max(self.steps, 1)

    def summary(self) -> str:
        """One line."""
        sets, n = self.distinct_sets, len(self.completions)
        return (
            f"{sets} set{'s' * (sets != 1)} of layers in {n} completion{'s' * (n != 1)}, "
            f"batching {self.batching}: of {self.num_layers} layers a token keeps "
            f"{self.kept_per_token:.1f} and a step computes {self.computed_per_step:.1f}; "
            f"{_ms(self.seconds, self.steps)} ms a step, {_ms(self.seconds, self.tokens)} a token"
        )

    def table(self) -> str:
        """A line a completion with its map of layers (`#` runs, `.` is skipped), and a summary."""
        scale = "".join(f"{i:<10}" for i in range(0, self.num_layers, 10))
        lines = [f"prompt sample  kept tokens  ms/token  {scale}".rstrip()]
        for entry in self.completions:
            drawn = "".join("#" if kept else "." for kept in entry.keep)
            lines.append(
                f"{entry.prompt_index:6d} {entry.sample_index:6d} {sum(entry.keep):5d} "
                f"{entry.tokens:6d} {_ms(entry.seconds, entry.tokens):>9}  {drawn}"
            )
        return "\n".join([*lines, self.summary()])


def _ms(seconds: float, number: int) -> str:
    return f"{1e3 * seconds / number:.2f}" if number else "-"
