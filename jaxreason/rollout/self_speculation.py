"""Self-speculative decoding: some of a model's layers draft tokens, all of them verify the drafts.

What comes out is the full model's: token for token where greedy, in distribution where sampled
(`rollout.draft_verify`). The draft is an early exit (LayerSkip, arXiv 2404.16710, section 4.3) or
any set of layers (Draft & Verify, arXiv 2309.08168), for all prompts or, by routers, for each.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.depth.decision import Skipper, decide_layers
from jaxreason.rollout.requests import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfSpeculation:
    """Which layers draft, and how far ahead. Without either, those that the model's `depth` names:
    its set, or the routers' choice by prompt (whose prompts then run all layers, whatever the
    routers' scope)."""

    exit_layer: int = 0
    """The first so many layers draft; 0: see `layers`."""
    layers: tuple[bool, ...] | None = None
    """The layers that draft, one truth value a layer."""
    tokens: int = 6
    """Tokens drafted before a verification (official code's examples: 4, 6 and 12)."""

    def plan(
        self, model: Any, requests: Sequence[Request]
    ) -> tuple[Any, list[Request], "DraftPlan"]:
        """The model and the requests as the engine is to serve them, and the drafts' form.

        Raises:
          UserError: the settings contradict each other, the model or a request.
        """
        if self.tokens < 1:
            raise UserError(f"{self.tokens} draft tokens; expected at least 1")
        if any(r.keep is not None for r in requests):
            raise UserError(
                "a request names the layers that run (keep), and self-speculative decoding gives "
                "the full model's text: give one of them"
            )
        # No row drafts more: its first token is the prompt's, and a verification brings one.
        most = max((r.max_new_tokens for r in requests), default=self.tokens + 2) - 2
        tokens = max(1, min(self.tokens, most))
        keep = self._set(model)
        sampled = any(r.sampling.temperature > 0 for r in requests)
        if keep is None:  # Each prompt's own.
            depth = dataclasses.replace(model.depth, scope="decode_only")
            return (
                dataclasses.replace(model, depth=depth), list(requests),
                DraftPlan(tokens, None, sampled),
            )  # fmt: skip
        model, exit_layer = dataclasses.replace(model, depth=None), sum(keep)
        if all(keep[:exit_layer]):
            return model, list(requests), DraftPlan(tokens, exit_layer, sampled)
        requests = [dataclasses.replace(r, keep=keep, skip_scope="decode_only") for r in requests]
        return model, requests, DraftPlan(tokens, None, sampled)

    def _set(self, model: Any) -> tuple[bool, ...] | None:
        """The layers that draft for every prompt; None where routers choose by prompt."""
        num_layers = model.config.num_layers
        if self.exit_layer and self.layers is not None:
            raise UserError("an exit layer and a set of draft layers were given; give one")
        if self.layers is not None:
            if len(self.layers) != num_layers:
                raise UserError(
                    f"the draft's layers have {len(self.layers)} truth values; the model has "
                    f"{num_layers} layers: give one for each"
                )
            return tuple(map(bool, self.layers))
        if self.exit_layer:
            if not 1 <= self.exit_layer <= num_layers:
                raise UserError(
                    f"exit layer {self.exit_layer}: expected 1 to {num_layers}, the model's layers"
                )
            return tuple(layer < self.exit_layer for layer in range(num_layers))
        if model.depth is None:
            raise UserError(
                "self-speculative decoding needs to know which layers draft: the model has no "
                "routers or set of its own, so give an exit layer or the draft's layers"
            )
        return static_set(model.depth)


@dataclasses.dataclass(frozen=True)
class DraftPlan:
    """What the token loop is compiled for: draft tokens, the exit (None: each slot has a set of
    layers), and whether any request samples."""

    tokens: int
    exit_layer: int | None
    sampled: bool

    def front(self, num_layers: int) -> tuple[bool, ...]:
        """The layers before the exit."""
        return tuple(layer < (self.exit_layer or 0) for layer in range(num_layers))


def static_set(depth: Skipper) -> tuple[bool, ...] | None:
    """The layers that routers choose whatever they read; None where it depends on the prompt."""
    if np.any(np.asarray(depth.routers["w"])):
        return None
    p = 1 / (1 + np.exp(-np.asarray(depth.routers["b"], np.float32)))
    chosen = decide_layers(depth.decision, jnp.asarray(p)[:, None], jnp.ones((len(p), 1)))
    return tuple(np.asarray(chosen)[:, 0].tolist())


@dataclasses.dataclass(kw_only=True)
class Drafts:
    """One completion: its verifications, and the time that its tokens after the first took."""

    prompt_index: int
    sample_index: int
    layers: tuple[bool, ...]
    """The layers that drafted."""
    verifications: int = 0
    drafted: int = 0
    accepted: int = 0
    """Draft tokens that the full model agreed to."""
    tokens: int = 0
    seconds: float = 0.0
    """Wall time of the rounds that it took part in, its neighbours' work included."""


@dataclasses.dataclass(kw_only=True)
class DraftStats:
    """What drafting did, over all calls that shared the record. Compiling is left out.

    Tokens are those that the device drew; a stop string may cut some of the last ones off.
    """

    completions: list[Drafts] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def new(self, request: Request, layers: tuple[bool, ...]) -> Drafts:
        """A record for a completion that begins."""
        entry = Drafts(
            prompt_index=request.prompt_index, sample_index=request.sample_index, layers=layers
        )
        self.completions.append(entry)
        return entry

    def add(self, entries: Sequence[Drafts], counts: Sequence[Sequence[int]], seconds: float):
        """Counts a call of the token loop, in which entry i had `counts[i]`: verifications, draft
        tokens, accepted ones, tokens."""
        rounds = max(row[0] for row in counts)
        self.seconds += seconds
        for entry, (verifications, drafted, accepted, tokens) in zip(entries, counts, strict=True):
            entry.verifications += int(verifications)
            entry.drafted += int(drafted)
            entry.accepted += int(accepted)
            entry.tokens += int(tokens)
            entry.seconds += seconds * float(verifications) / rounds if rounds else 0.0

    def _total(self, name: str) -> int:
        return sum(getattr(entry, name) for entry in self.completions)

    @property
    def tokens(self) -> int:
        """Tokens after each completion's first."""
        return self._total("tokens")

    @property
    def acceptance(self) -> float:
        """The share of draft tokens that were accepted; those behind a rejected one count."""
        return self._total("accepted") / max(self._total("drafted"), 1)

    @property
    def tokens_per_verification(self) -> float:
        """Mean number of tokens that a verification gave a completion: 1 to draft tokens + 1."""
        return self.tokens / max(self._total("verifications"), 1)

    def summary(self) -> str:
        """One line."""
        n, drafted = len(self.completions), self._total("drafted")
        return (
            f"self-speculative, {n} completion{'s' * (n != 1)}: {self._total('accepted')} of "
            f"{drafted} draft tokens accepted ({_percent(self.acceptance, drafted)}), "
            f"{self.tokens_per_verification:.2f} tokens a verification; "
            f"{_ms(self.seconds, self.tokens)} ms a token"
        )

    def table(self) -> str:
        """A line a completion with the map of layers that drafted (`#`), and a summary."""
        count = len(self.completions[0].layers) if self.completions else 0
        scale = "".join(f"{i:<10}" for i in range(0, count, 10))
        names = "prompt sample  verifications drafted accepted  rate tokens  ms/token"
        lines = [f"{names}  {scale}".rstrip()]
        for e in self.completions:
            drawn = "".join("#" if drafts else "." for drafts in e.layers)
            lines.append(
                f"{e.prompt_index:6d} {e.sample_index:6d} {e.verifications:14d} {e.drafted:7d} "
                f"{e.accepted:8d} {_percent(e.accepted / max(e.drafted, 1), e.drafted):>5} "
                f"{e.tokens:6d} {_ms(e.seconds, e.tokens):>9}  {drawn}"
            )
        return "\n".join([*lines, self.summary()])


def _percent(share: float, number: int) -> str:
    return f"{100 * share:.0f}%" if number else "-"


def _ms(seconds: float, number: int) -> str:
    return f"{1e3 * seconds / number:.2f}" if number else "-"
