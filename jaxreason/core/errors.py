"""The one exception that means: the user can mend this."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input (config, data file, checkpoint, prompt, flag).

    The message is one line that says what was got, what was expected and what to do. The command
    lines print it to stderr after `error: ` and exit with code 2; a traceback is never shown.
    """


class Preempted(Exception):
    """The run saved its state and stopped because it was told to; start it again to go on."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}, which is saved; the same command goes on")
        self.step = step


def nearest(got: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(got, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
