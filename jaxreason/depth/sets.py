"""Sets of layers that ignore the input: the peers of a router, under the same training.

A set is a tuple of one truth value a layer. Trained and run, it is the decision of routers that do
not look (`decision.static_routers`), so that every peer takes the path that FiRST takes.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.depth.decision import Decision, Scope
from jaxreason.depth.evenly import Evenly, evenly_set
from jaxreason.depth.first import FirstConfig
from jaxreason.depth.layerskip import LayerSkip, front
from jaxreason.depth.unified import unified_set


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllLayers:
    """No skipping: the upper bound of quality, the lower of speed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unified:
    """Unified Layer Skipping (arXiv 2404.06954): layers at even distances, for every input."""

    kept: int = 0
    """Layers that run."""
    scope: Scope = "decode_only"
    """Where layers are skipped; the official code reads the prompt with all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomLayers:
    """A set drawn once, for every input."""

    kept: int = 0
    """Layers that run."""
    seed: int = 0
    """Seed of the draw."""
    always_keep: tuple[int, ...] = (0, -1)
    """Layers that are in the set anyway; -1 is the last."""
    scope: Scope = "decode_only"
    """Where layers are skipped."""

    def validate(self) -> None:
        """Raises UserError for a seed that NumPy does not take."""
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; expected 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockInfluence:
    """The layers that change their input most (ShortGPT, arXiv 2403.03853), for every input."""

    kept: int = 0
    """Layers that run."""
    batches: int = 4
    """Training batches, prompts and completions, that influence is measured on (reconstructed)."""
    always_keep: tuple[int, ...] = ()
    """Layers that are in the set anyway; -1 is the last."""
    scope: Scope = "decode_only"
    """Where layers are skipped; ShortGPT removes them altogether (`everywhere`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipCost:
    """The layers that cost most loss when each alone is left out (arXiv 2402.02834)."""

    kept: int = 0
    """Layers that run."""
    batches: int = 2
    """Training batches whose completions the loss is taken on (reconstructed)."""
    always_keep: tuple[int, ...] = (0, -1)
    """Layers that are in the set anyway, and are not measured; -1 is the last."""
    scope: Scope = "decode_only"
    """Where layers are skipped; the paper removes them altogether (`everywhere`)."""

    def validate(self) -> None:
        """Raises UserError where there would be nothing to measure on."""
        if self.batches < 1:
            raise UserError(f"batches is {self.batches}; expected 1 or more")


StaticSet = AllLayers | Unified | Evenly | RandomLayers | BlockInfluence | SkipCost | LayerSkip


def choose(
    method: StaticSet,
    num_layers: int,
    influence: Callable[[int], np.ndarray],
    costs: Callable[[int, tuple[bool, ...], Scope], np.ndarray],
) -> tuple[bool, ...]:
    """A method's set for a model of `num_layers`.

    `influence(batches)` and `costs(batches, always, scope)` measure the layers [L].

    Raises:
      UserError: the set cannot have `kept` layers.
    """
    match method:
        case AllLayers():
            return (True,) * num_layers
        case Unified():
            return unified_set(num_layers, method.kept)
        case Evenly():
            return evenly_set(num_layers, method.kept)
        case RandomLayers():
            always = Decision(always_keep=method.always_keep).always(num_layers)
            return random_set(num_layers, method.kept, method.seed, always)
        case BlockInfluence():
            always = Decision(always_keep=method.always_keep).always(num_layers)
            check_kept(method.kept, always)
            return most_influential(influence(method.batches), method.kept, always)
        case SkipCost():
            always = Decision(always_keep=method.always_keep).always(num_layers)
            check_kept(method.kept, always)
            found = costs(method.batches, always, method.scope)
            return most_influential(found, method.kept, always)
        case LayerSkip():
            method.check(num_layers)
            return front(num_layers, method.kept)


def gating(method: StaticSet) -> FirstConfig:
    """How routers that do not look are taken at their word."""
    scope = "decode_only" if isinstance(method, AllLayers) else method.scope
    return FirstConfig(scope=scope, decision=Decision(always_keep=()))


def check_kept(kept: int, always: tuple[bool, ...]) -> None:
    """Raises UserError unless `kept` of the layers can run with those of `always` among them."""
    least = max(1, sum(always))
    if not least <= kept <= len(always):
        raise UserError(
            f"kept is {kept}; expected {least} (the layers always kept) to {len(always)} (all)"
        )


def most_influential(
    influence: np.ndarray, kept: int, always: tuple[bool, ...]
) -> tuple[bool, ...]:
    """Whether each layer runs when those `kept` with the largest measure do, `always` first.

    Of equal layers the lower one runs.
    """
    return _largest(np.asarray(influence, np.float64), kept, always)


def random_set(num_layers: int, kept: int, seed: int, always: tuple[bool, ...]) -> tuple[bool, ...]:
    """Whether each layer runs when `kept` drawn at random do, those of `always` among them."""
    return _largest(np.random.default_rng(seed).random(num_layers), kept, always)


def _largest(score: np.ndarray, kept: int, always: tuple[bool, ...]) -> tuple[bool, ...]:
    check_kept(kept, always)
    order = np.argsort(-np.where(always, np.inf, score), kind="stable")
    chosen = {int(layer) for layer in order[:kept]}
    return tuple(layer in chosen for layer in range(len(score)))
