"""Where the time of generation goes: compiling, reading prompts, drawing tokens."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Literal

import jax

from jaxreason.rollout.layer_stats import LayerStats
from jaxreason.rollout.self_speculation import DraftStats


@dataclasses.dataclass(kw_only=True)
class Stats:
    """Totals over the calls that were given this record. Seconds of wall time.

    A request's first token belongs to the prefill. Prefill and decode leave compiling out, which
    `compile_seconds` counts.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    layers: LayerStats | None = None
    """What skipping did; None where no layer could be skipped."""
    drafts: DraftStats | None = None
    """What self-speculative decoding did; None without it."""

    @contextlib.contextmanager
    def timed(self, stage: Literal["prefill", "decode"]) -> Iterator[None]:
        """Adds the time of a block to a stage; the block waits for its device results."""
        with _compiling() as spans:
            start = time.perf_counter()
            yield
            seconds = time.perf_counter() - start
        compiled = min(_union(spans), seconds)
        self.compile_seconds += compiled
        name = f"{stage}_seconds"
        setattr(self, name, getattr(self, name) + seconds - compiled)

    def summary(self) -> str:
        """One line of rates."""
        parts = [
            _rate("prefill", self.prefill_tokens, self.prefill_seconds),
            _rate("decode", self.decode_tokens, self.decode_seconds),
            f"compiling {self.compile_seconds:.1f} s",
        ]
        return ", ".join(parts)


def _rate(name: str, tokens: int, seconds: float) -> str:
    rate = f"{tokens / seconds:.1f}" if seconds and tokens else "-"
    return f"{name} {tokens} tokens in {seconds:.2f} s ({rate} tokens/s)"


@contextlib.contextmanager
def _compiling() -> Iterator[list[tuple[float, float]]]:
    """Collects when JAX traced, lowered or compiled: (start, end), nested ones included."""
    spans: list[tuple[float, float]] = []

    def listen(event: str, duration_secs: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            spans.append((time.perf_counter() - duration_secs, time.perf_counter()))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield spans
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _union(spans: list[tuple[float, float]]) -> float:
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total
