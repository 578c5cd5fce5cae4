"""Text of a growing list of tokens: no half characters, and nothing of a stop string."""

import os
from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
# The bytes of a character that is not complete show as one U+FFFD, or (byte fallback) one a byte.
MAX_UNFINISHED = 3
MAX_WINDOW = 32


class Detokenizer:
    """Turns tokens into text piece by piece, each of which costs the decoding of a few tokens.

    Bytes of a character that is not complete yet wait for the rest, so U+FFFD shows only for what
    is not UTF-8 at all; those left at the end are not shown. Pieces are decoded behind the tokens
    before them, since some tokenizers drop the space at the start of a text; `prompt` holds the
    tokens before the first.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()):
        self._decode = decode
        # The last piece's tokens and what has come since, and how much of their text was returned.
        self._window = list(prompt[-8:])
        while self._window and decode(self._window).startswith(UNFINISHED):  # Inside a character.
            del self._window[0]
        self._shown = decode(self._window).rstrip(UNFINISHED)
        self._new = 0

    def add(self, token: int) -> str:
        """The text that `token` completes: that of a word often, at times nothing."""
        self._window.append(token)
        self._new += 1
        text = self._decode(self._window)
        ready = _finished(text)
        piece = ready[len(os.path.commonprefix([ready, self._shown])) :]
        self._shown = ready if len(ready) > len(self._shown) else self._shown
        if (piece and ready == text) or len(self._window) > MAX_WINDOW:
            self._window = self._window[-min(self._new, MAX_WINDOW // 2) :]
            self._shown, self._new = _finished(self._decode(self._window)), 0
        return piece


def _finished(text: str) -> str:
    """The text without what may be an unfinished character at its end."""
    tail = len(text) - len(text.rstrip(UNFINISHED))
    return text[: len(text) - min(tail, MAX_UNFINISHED)]


class StopBuffer:
    """Holds back text that may become a stop string, and ends the text before one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit = False

    def add(self, text: str) -> str:
        """The text that may be shown now. Sets `hit` when a stop string is complete."""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def end(self) -> str:
        """What was held back, when no more text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
