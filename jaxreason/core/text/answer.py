"""The marked answer at the end of a worked solution: `#### 42`, GSM8K's mark."""

import re
from fractions import Fraction

ANSWER_MARK = "####"
"""What stands before the answer, on the last line of a solution (GSM8K, arXiv 2110.14168)."""
# Bounded: a degenerate reply may have thousands of digits, which Python refuses to read.
_NUMBER = re.compile(r"[-+]?\$?\s*(\d[\d,]{0,80}(?:\.\d{1,80})?)(?:/(\d{1,80}))?")


def marked_answer(text: str) -> Fraction | None:
    """Returns the number behind the first mark of `text`, exactly; None where there is none.

    A sign, thousands commas, a dollar sign, decimals and a fraction are read; what follows the
    number is not looked at. The first mark counts: text that a model writes on after its answer
    changes nothing.
    """
    _, mark, rest = text.partition(ANSWER_MARK)
    rest = rest.split("\n", 1)[0].strip()
    found = _NUMBER.match(rest) if mark else None
    if found is None:
        return None
    whole, below = found.groups()
    if below is not None and not int(below):
        return None
    value = Fraction(whole.replace(",", "")) / int(below or 1)
    return -value if rest.startswith("-") else value


def same_answer(text: str, reference: str) -> bool:
    """Whether `text` ends in the marked answer of `reference`, compared as exact numbers.

    Raises:
        ValueError: the reference has no marked answer.
    """
    wanted = marked_answer(reference)
    if wanted is None:
        raise ValueError(f"no {ANSWER_MARK} and number in the reference {reference[-60:]!r}")
    return marked_answer(text) == wanted
