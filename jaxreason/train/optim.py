"""Optimisers and learning-rate schedules, from optax."""

import dataclasses
from typing import Any, Literal

import jax
import optax
import optax.contrib

from jaxreason.core.errors import UserError
from jaxreason.core.params import ParamSpec

# Axes that a weight sums over; what is left of a matrix (but for layers) is its output.
_OUTPUT_FIRST = {("heads", "head_dim", "embed"), ("mlp", "embed")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and schedule."""

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    """adamw; muon for the blocks' matrices with adamw for the rest; plain sgd, without moments,
    whose decay is scaled by the learning rate too."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices under muon."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warm-up; wsd is warm-up, stable, decay (linear, at the end)."""
    warmup_steps: int = 50
    """Steps of linear warm-up from 0."""
    final_fraction: float = 0.1
    """Learning rate at the last step as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Part of the run that wsd decays in."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices (not of norms and biases), times the learning rate."""
    clip_norm: float = 1.0
    """Bound of the gradient's global norm; 0 does not clip."""

    def validate(self) -> None:
        """Raises UserError for values outside their range."""
        for name in ("learning_rate", "muon_learning_rate", "clip_norm", "weight_decay", "eps"):
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("final_fraction", "decay_fraction", "b1", "b2"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optim.{name} is {getattr(self, name)}; expected 0 to 1")


def make_schedule(cfg: OptimConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Learning rate by step: a linear rise to the peak, then down to `final_fraction` of it."""
    peak = cfg.learning_rate if peak is None else peak
    last, warm = peak * cfg.final_fraction, min(cfg.warmup_steps, steps)
    left = max(steps - warm, 1)
    decay = max(1, min(left, round(cfg.decay_fraction * steps)))
    after = {
        "cosine": [(optax.cosine_decay_schedule(peak, left, cfg.final_fraction), 0)],
        "linear": [(optax.linear_schedule(peak, last, left), 0)],
        "constant": [(optax.constant_schedule(peak), 0)],
        "wsd": [
            (optax.constant_schedule(peak), 0),
            (optax.linear_schedule(peak, last, decay), steps - decay),
        ],
    }[cfg.schedule]
    # Update number `warm` is the first at the peak; update 1 already moves.
    parts = [optax.linear_schedule(peak / max(warm, 1), peak, max(warm - 1, 1)), after[0][0]]
    bounds = [warm]
    for schedule, start in after[1:]:
        parts, bounds = [*parts, schedule], [*bounds, max(start, warm)]
    return optax.join_schedules(parts, bounds)


def _decayed(specs) -> Any:
    """True for matrices (they read or write the residual stream), False for norms and biases."""

    def one(spec: ParamSpec) -> bool:
        return "embed" in spec.axes and sum(axis != "layers" for axis in spec.axes) > 1

    return jax.tree.map(one, specs)


def _muon_dimensions(specs) -> Any:
    """Muon's reduction and output axes of the blocks' matrices; None leaves a leaf to AdamW."""

    def one(spec: ParamSpec):
        axes = spec.axes
        inner = [i for i, axis in enumerate(axes) if axis not in ("layers", "expert")]
        if "layers" not in axes or "vocab" in axes or len(inner) < 2:
            return None
        names = tuple(axes[i] for i in inner)
        cut = len(inner) - 1 if names in _OUTPUT_FIRST else 1
        if names[0] != "embed" and names not in _OUTPUT_FIRST:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(inner[:cut]), tuple(inner[cut:]))

    return jax.tree.map(one, specs)


def make_optimiser(cfg: OptimConfig, specs, steps: int) -> optax.GradientTransformation:
    """The optimiser of one parameter group described by `specs`, for a run of `steps` updates."""
    schedule = make_schedule(cfg, steps)

    def adamw(decayed):
        return optax.adamw(
            schedule, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=decayed
        )

    if cfg.name == "sgd":
        decay = optax.add_decayed_weights(cfg.weight_decay, _decayed(specs))
        return optax.chain(decay, optax.sgd(schedule))
    if cfg.name == "adamw":
        return adamw(_decayed(specs))
    dimensions, decayed = _muon_dimensions(specs), _decayed(specs)
    is_leaf = lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)  # noqa: E731
    labels = jax.tree.map(lambda d: "muon" if d else "adamw", dimensions, is_leaf=is_leaf)

    def here(tree):
        """The part of a tree over all parameters that belongs to a partition's parameters."""
        masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
        return lambda params: jax.tree.map(
            lambda x, p: p if masked(p) else x,
            tree,
            params,
            is_leaf=lambda x: is_leaf(x) or masked(x),
        )

    # optax's muon would give the rest of the parameters an AdamW without mask and eps of its own.
    muon = optax.contrib.muon(
        make_schedule(cfg, steps, cfg.muon_learning_rate),
        weight_decay=cfg.weight_decay,
        muon_weight_dimension_numbers=here(dimensions),
    )
    return optax.partition({"muon": muon, "adamw": adamw(here(decayed))}, labels)
