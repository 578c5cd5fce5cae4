"""Scores of a generated text against its reference, in percent; a dict names them.

ROUGE-L and chrF come from the packages that papers use, `rouge-score` and `sacrebleu`, with their
default settings (ROUGE with Porter's stemmer, as in Hugging Face's summarisation scripts).
"""

import functools
from collections.abc import Callable
from typing import Any

from jaxreason.core.errors import UserError
from jaxreason.core.text.answer import same_answer

Metric = Callable[[str, str], float]


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L: F measure of the longest common subsequence of stemmed words, 0 to 100.

    Lin 2004; `rouge_score.rouge_scorer`.

    Raises:
        UserError: the package rouge-score is not installed.
    """
    return 100.0 * _scorer().score(reference, text)["rougeL"].fmeasure


def chrf(text: str, reference: str) -> float:
    """chrF2 of one sentence: F measure of character n-grams up to 6, recall twice, 0 to 100.

    Popovic 2015; `sacrebleu.sentence_chrf`. A mean over texts is a mean of sentences' scores, which
    is not sacrebleu's score of the corpus.

    Raises:
        UserError: the package sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError:
        raise _absent("sacrebleu") from None
    return float(sacrebleu.sentence_chrf(text, [reference]).score)


def exact_answer(text: str, reference: str) -> float:
    """100 where the text's marked answer (`#### 42`) is the reference's number, else 0.

    Raises:
        ValueError: the reference has no marked answer.
    """
    return 100.0 * same_answer(text, reference)


METRICS: dict[str, Metric] = {"rouge_l": rouge_l, "chrf": chrf, "exact": exact_answer}


@functools.cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _absent("rouge-score") from None
    return RougeScorer(["rougeL"], use_stemmer=True)


def _absent(package: str) -> UserError:
    return UserError(
        f"this score needs the package {package}; install it: pip install 'jaxreason[tasks]'"
    )
