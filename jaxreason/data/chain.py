"""Chains of integer arithmetic: a procedural reasoning task with exact answers and known steps.

A problem defines variables one from another and asks for one of them; the solution walks the chain,
one operation a step. Every step ends with `.` and a blank line, which is where step-level methods
cut a response. Example i is a pure function of (config, i), so that a data set needs no storage,
and two hosts that hold the same config hold the same problems.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from jaxreason.core.errors import UserError
from jaxreason.data.packing import random_bits
from jaxreason.data.sources import Document

STEP_END = ".\n\n"
"""What closes every step of a solution, and occurs nowhere else in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainArithmetic:
    """Problems such as `Let k = 7. Let a = k * 3. What is a?`, with worked solutions."""

    num_examples: int = 20_000
    """Number of examples; example i does not depend on it."""
    min_steps: int = 2
    """Least number of operations between the given number and the answer."""
    max_steps: int = 6
    """Greatest number of operations; the number is uniform between the two."""
    max_value: int = 9
    """Greatest number written in a problem; numbers are uniform in 1 .. max_value."""
    operations: tuple[Literal["+", "-", "*"], ...] = ("+", "-", "*")
    """Operations to draw from; one named twice is drawn twice as often."""
    modulus: int | None = 97
    """Every value is reduced modulo this number, which bounds the answers; None: plain integers."""
    distractors: int = 0
    """Number of variables that are defined but not needed."""
    shuffled: bool = False
    """Whether the definitions stand in random order, so that the chain has to be searched for."""
    seed: int = 0
    """Seed of the examples; another seed gives other problems."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem: `solution` is the steps joined, then a sentence with the boxed answer."""

    prompt: str
    solution: str
    answer: str
    steps: tuple[str, ...]


def check(cfg: ChainArithmetic) -> None:
    """Raises UserError where a field of `cfg` allows no examples."""
    wrong = None
    if cfg.num_examples < 1:
        wrong = f"num_examples={cfg.num_examples}, expected 1 or more"
    elif not 1 <= cfg.min_steps <= cfg.max_steps:
        wrong = (
            f"min_steps={cfg.min_steps} and max_steps={cfg.max_steps}, "
            "expected 1 <= min_steps <= max_steps"
        )
    elif cfg.max_value < 1:
        wrong = f"max_value={cfg.max_value}, expected 1 or more"
    elif not cfg.operations or not set(cfg.operations) <= {"+", "-", "*"}:
        wrong = f"operations={cfg.operations!r}, expected one or more of '+', '-', '*'"
    elif cfg.modulus is not None and cfg.modulus < 2:
        wrong = f"modulus={cfg.modulus}, expected 2 or more, or None"
    elif cfg.distractors < 0:
        wrong = f"distractors={cfg.distractors}, expected 0 or more"
    if wrong:
        raise UserError(f"chain arithmetic has {wrong}; set the field to a value in range")


def example(cfg: ChainArithmetic, index: int) -> Example:
    """Returns example `index` (0 <= index < num_examples), a pure function of its arguments."""
    if not 0 <= index < cfg.num_examples:
        raise IndexError(f"example {index} of {cfg.num_examples}")
    draws = _Draws(cfg.seed, index)
    num_steps = cfg.min_steps + draws.below(cfg.max_steps - cfg.min_steps + 1)
    names = _names(num_steps + 1 + cfg.distractors, draws)

    # The chain: names[0] is given, names[j] comes from names[j - 1].
    start = _reduce(1 + draws.below(cfg.max_value), cfg.modulus)
    lines, steps, value = [f"Let {names[0]} = {start}."], [], start
    for j in range(1, num_steps + 1):
        op, operand = (
            cfg.operations[draws.below(len(cfg.operations))],
            1 + draws.below(cfg.max_value),
        )
        lines.append(f"Let {names[j]} = {names[j - 1]} {op} {operand}.")
        exact = _apply(op, value, operand)
        reduced = _reduce(exact, cfg.modulus)
        step = f"{names[j]} = {names[j - 1]} {op} {operand} = {value} {op} {operand} = {exact}"
        if reduced != exact:
            step += f", which is {reduced} modulo {cfg.modulus}"
        steps.append(step + STEP_END)
        value = reduced

    # A distractor hangs on any variable defined above it; nothing asked for hangs on a distractor.
    for name in names[num_steps + 1 :]:
        place = 1 + draws.below(len(lines))
        parent = lines[draws.below(place)].split()[1]
        op, operand = (
            cfg.operations[draws.below(len(cfg.operations))],
            1 + draws.below(cfg.max_value),
        )
        lines.insert(place, f"Let {name} = {parent} {op} {operand}.")
    if cfg.shuffled:
        lines = draws.shuffle(lines)

    modulo = f" Work modulo {cfg.modulus}." if cfg.modulus is not None else ""
    answer = str(value)
    return Example(
        prompt=f"{' '.join(lines)}{modulo} What is {names[num_steps]}?\n\n",
        solution="".join(steps) + f"The answer is \\boxed{{{answer}}}.",
        answer=answer,
        steps=tuple(steps),
    )


def iter_documents(cfg: ChainArithmetic) -> Iterator[Document]:
    """Yields every example as a document: the prompt, then the solution."""
    check(cfg)
    for index in range(cfg.num_examples):
        one = example(cfg, index)
        yield Document(f"chain-{cfg.seed}-{index}", one.prompt + one.solution)


def _apply(op: str, left: int, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[op]


def _reduce(value: int, modulus: int | None) -> int:
    return value if modulus is None else value % modulus


def _names(count: int, draws: "_Draws") -> list[str]:
    """Returns `count` distinct names in random order: a .. z, then a1 .. z1, and so on."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    rounds = -(-count // len(letters))
    pool = [c + (str(r) if r else "") for r in range(rounds) for c in letters]
    return draws.shuffle(pool)[:count]


class _Draws:
    """A stream of small random integers for one example."""

    def __init__(self, seed: int, index: int):
        self._key, self._block, self._words = (seed, index), 0, iter(())

    def _word(self) -> int:
        word = next(self._words, None)
        if word is None:
            self._words = iter(random_bits(64, "chain", *self._key, self._block).tolist())
            self._block += 1
            word = next(self._words)
        return word

    def below(self, n: int) -> int:
        return (self._word() * n) >> 64  # uniform up to n / 2**64

    def shuffle(self, items: list) -> list:
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items
