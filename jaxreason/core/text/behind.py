"""The ids of a text that stands behind another one whose ids are fixed, as a prompt's are."""

from jaxreason.core.text.tokenizer import Tokenizer

# What may stand before a text so that it is not at the beginning; one that no token joins with it.
_BORDERS = ("\n", "|", ".", "~", "0")


def encode_behind(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """Returns the ids of `text` behind `before`, whose ids are those that it has by itself.

    They are the rest of the whole text's ids where those begin with the ids of `before`. Otherwise
    a token would lie across the border, which a model that goes on from `before` cannot write: then
    they are the ids of `text` alone, without the space that some tokenizers (Llama 2's) put in
    front of every text.
    """
    head, whole = tokenizer.encode(before), tokenizer.encode(before + text)
    if whole[: len(head)] == head:
        return whole[len(head) :]
    alone = tokenizer.encode(text)
    if _inside(tokenizer, "a") in (None, tokenizer.encode("a")):
        return alone
    return _inside(tokenizer, text) or alone


def _inside(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """The ids of a text that is not at the beginning; None where no border stays apart from it."""
    for border in _BORDERS:
        head, whole = tokenizer.encode(border), tokenizer.encode(border + text)
        if head and whole[: len(head)] == head:
            return whole[len(head) :]
    return None
