"""The one exception that means: the user can mend this."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input (config, data file, checkpoint, prompt, flag).

    The message is one line that says what was got, what was expected and what to do. The command
    lines print it to stderr after `error: ` and exit with code 2; a traceback is never shown.
    """


def nearest(got: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(got, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
