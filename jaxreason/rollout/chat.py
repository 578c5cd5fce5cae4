"""A conversation in the terminal: history, streamed replies, /reset, /quit, Ctrl-C for a reply."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from jaxreason.core.errors import UserError
from jaxreason.depth.decision import Scope
from jaxreason.rollout.chat_template import render_chat
from jaxreason.rollout.engine import generate, prepare
from jaxreason.rollout.sampling import Sampling
from jaxreason.rollout.self_speculation import SelfSpeculation
from jaxreason.rollout.stats import Stats

HELP = "/reset forgets the conversation, /quit (or Ctrl-D) leaves, Ctrl-C stops a reply"


def chat(
    model: Any,
    sampling: Sampling,
    *,
    system: str = "",
    max_new_tokens: int = 1024,
    stop: tuple[str, ...] = (),
    seed: int = 0,
    keep: tuple[bool, ...] | None = None,
    skip_scope: Scope = "decode_only",
    speculation: SelfSpeculation | None = None,
    stats: Stats | None = None,
    read: Callable[[str], str] | None = None,
    out: TextIO,
) -> None:
    """Talks until /quit or the end of the input; `read(prompt)` gives the user's lines
    (None: the terminal's). `keep` and `skip_scope`: the layers that run, `speculation`: those
    that draft, as in `generate`.

    A reply that Ctrl-C stopped stays in the history as far as it came.

    Raises:
        UserError: the model has no chat template, or it refuses a conversation of this form; the
            model cannot draft as `speculation` says.
    """
    if speculation is not None:
        speculation.plan(model, [])  # Fails before it begins.
    model, read = prepare(model, slots=1), read or input
    start = [{"role": "system", "content": system}] if system else []
    history, turns = list(start), 0
    render_chat(model, [*start, {"role": "user", "content": "Hello"}])  # Fails before it begins.
    out.write(f"{HELP}\n")
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            out.write("\n")
            return
        except KeyboardInterrupt:
            out.write(f"\n{HELP}\n")
            continue
        if line == "/quit":
            return
        if line == "/reset":
            history = list(start)
            out.write("(forgotten)\n")
            continue
        if line.startswith("/"):
            out.write(f"{HELP}\n")
            continue
        if not line:
            continue
        try:
            asked = [*history, {"role": "user", "content": line}]
            prompt = render_chat(model, asked)
            reply = _reply(
                model, prompt, sampling, out, max_new_tokens=max_new_tokens, stop=stop,
                seed=seed + turns, keep=keep, skip_scope=skip_scope, speculation=speculation,
                stats=stats,
            )  # fmt: skip
        except UserError as error:  # Too long for the model, say: the user may /reset.
            out.write(f"error: {error}\n")
            continue
        turns += 1
        history = [*asked, {"role": "assistant", "content": reply}]


def _reply(model, prompt, sampling, out: TextIO, **settings: Any) -> str:
    def show(delta):
        out.write(delta.text)
        out.flush()

    with _interrupts() as stopped:
        (done,) = generate(
            model, [prompt], sampling, stream=show, cancel=stopped.is_set, **settings
        )
    out.write(" (stopped)\n" if done.finish_reason == "cancelled" else "\n")
    return done.text


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C interrupts as ever."""
    stopped = threading.Event()

    def handle(signum, frame):
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
