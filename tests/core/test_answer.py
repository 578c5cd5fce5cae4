"""Marked answers as exact numbers."""

from fractions import Fraction

import pytest

from jaxreason.core.text.answer import marked_answer, same_answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("work\n#### 42", 42),
        ("#### -7\nand more", -7),
        ("####1,234.50", Fraction(2469, 2)),
        ("#### $12", 12),
        ("#### -$12", -12),
        ("#### 3/4 of it", Fraction(3, 4)),
        ("#### 8.0", 8),
        ("#### 1\n#### 2", 1),
        ("#### 3.", 3),
        ("#### 0.1", Fraction(1, 10)),
        ("the answer is 42", None),
        ("#### forty", None),
        ("####\n42", None),
        ("#### 3/0", None),
        ("", None),
    ],
)
def test_marked_answer(text, value):
    assert marked_answer(text) == value


def test_same_answer():
    assert same_answer("so\n#### 288.0", "x\n#### 288")
    assert not same_answer("so 288", "x\n#### 288")
    assert not same_answer("so\n#### 2880", "x\n#### 288")
    with pytest.raises(ValueError, match="no ####"):
        same_answer("#### 1", "no mark")


def test_a_reply_of_thousands_of_digits_is_just_wrong():
    assert not same_answer("#### " + "7" * 5000, "#### 7")
    assert not same_answer("#### 7/" + "7" * 5000, "#### 7")
