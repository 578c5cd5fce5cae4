"""Word problems of reasoning-gym's gsm_symbolic, with worked solutions that end in `#### ANSWER`.

Problems are filled in from 85 templates (GSM-Symbolic, arXiv 2410.05229). reasoning-gym draws
problem i of seed s from `Random(s + i)`, so neighbouring seeds share draws; here a seed has a range
of its own, and problem i is a pure function of (seed, i) and the package's version.
"""

import dataclasses
import functools
import importlib.metadata
import random
import re
from collections.abc import Iterator
from typing import Any, Literal

from jaxreason.core.errors import UserError
from jaxreason.core.text.answer import ANSWER_MARK, marked_answer
from jaxreason.data.pairs import Example
from jaxreason.data.tasks.parts import Part, belongs, check_fraction

SEED_RANGE = 1 << 24
"""Problems of one seed: seed s is reasoning-gym's s * SEED_RANGE, so seeds never share a draw."""
_SUFFIX = " Give the result as your final answer. Do not include units."
# 0.1 + 0.2 written out: seven and more digits behind the point are a rounding error's.
_ROUNDING = re.compile(r"\d\.\d{7,}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GsmSymbolic:
    """Grade-school word problems with a chain of thought (package reasoning-gym)."""

    num_examples: int = 4000
    """Problems drawn; repeated questions and flawed solutions are left out, some 5 %."""
    seed: int = 0
    """Seed of the problems; other seeds share no draw, and few questions. Take one seed's `train`
    and another's `test`, and they share neither."""
    instruction: str = "End with the answer as a number behind ####."
    """Stands behind the question in every prompt (reconstructed)."""
    group_by: Literal["question", "template"] = "question"
    """What a split keeps together: `question` tests known templates with other numbers,
    `template` tests templates that training never saw."""
    part: Part = "all"
    """`train` or `test` leaves the other out: questions (or templates), told apart by a hash of
    their text, whatever their seed."""
    test_fraction: float = 0.1
    """About which share of the questions (or templates) is in `test`."""

    @property
    def examples(self) -> tuple[Example, ...]:
        """The examples, in order."""
        return examples(self)


def check(cfg: GsmSymbolic) -> None:
    """Raises UserError where a field of `cfg` allows no examples."""
    check_fraction(cfg.test_fraction, "GsmSymbolic")
    if not 1 <= cfg.num_examples <= SEED_RANGE:
        raise UserError(
            f"GsmSymbolic.num_examples={cfg.num_examples}, expected 1 to {SEED_RANGE}; "
            "set it to a number in range"
        )
    if cfg.seed < 0:
        raise UserError(f"GsmSymbolic.seed={cfg.seed}, expected 0 or more; set another seed")


def version() -> str:
    """The installed version of reasoning-gym, which the problems depend on.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "the gsm_symbolic task needs the package reasoning-gym; "
            "install it: pip install 'jaxreason[tasks]'"
        ) from None


@functools.cache
def examples(cfg: GsmSymbolic) -> tuple[Example, ...]:
    """Returns the examples: question and instruction, the solution, `gsm_symbolic/SEED/INDEX`.

    The group is the template (`template-17`) or empty. Left out are questions that came before,
    and problems whose solution is flawed: it comes to another number than the answer, or shows a
    rounding error of floating-point numbers.

    Raises:
        UserError: a field is out of range, or reasoning-gym is not installed.
    """
    check(cfg)
    found, seen = [], set()
    for index, (template, problem) in enumerate(_problems(cfg)):
        solution = _solution(problem)
        question = problem["question"].removesuffix(_SUFFIX).strip()
        group = f"template-{template:02d}" if cfg.group_by == "template" else ""
        if solution is None or question in seen:
            continue
        if not belongs(group or question, cfg.part, cfg.test_fraction):
            continue
        seen.add(question)
        prompt = f"{question}\n{cfg.instruction}\n\n"
        found.append(Example(prompt, solution, f"gsm_symbolic/{cfg.seed}/{index}", group))
    return tuple(found)


def _problems(cfg: GsmSymbolic) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (template, problem of reasoning-gym)."""
    version()
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import (  # pyright: ignore
        GSMSymbolicDataset,
        GSMSymbolicDatasetConfig,
        tasks_ok,
    )

    start = cfg.seed * SEED_RANGE
    generators = GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=start, size=1)).generators
    for index in range(cfg.num_examples):
        # Its own data set draws all templates in one call, so problem i would depend on the size.
        draw = random.Random(start + index)
        template = draw.choice(tasks_ok)
        yield template, generators[template](draw, 1.0)


def _solution(problem: dict[str, Any]) -> str | None:
    """The chain of thought with its answer marked, as reasoning-gym writes it; None if flawed."""
    text, answer = problem["metadata"]["answer_cot"].strip(), problem["answer"].strip()
    work, mark, _ = text.partition(ANSWER_MARK)
    if not mark or not work.strip() or _ROUNDING.search(work):
        return None
    # "#### 8.0" and "8" are one number, and are marked in one way.
    if marked_answer(text) is None or marked_answer(text) != marked_answer(f"{mark} {answer}"):
        return None
    return f"{work.strip()}\n{ANSWER_MARK} {answer}"
