"""Models with routers for the tests of skipped layers."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
from rollout_model import tiny_model

from jaxreason.depth.decision import Decision, Skipper, static_routers
from jaxreason.models.model import Model
from jaxreason.rollout import Completion, prepare

LAYERS, WIDTH = 4, 32
SCOPES = ("decode_only", "everywhere")


def with_depth(model: Model, depth: Skipper) -> Model:
    """The model with these routers."""
    return dataclasses.replace(model, depth=depth)


@functools.cache
def tiny() -> Model:
    """The model of four layers, as it was initialised."""
    return tiny_model(num_layers=LAYERS)


@functools.cache
def _prepared() -> Model:
    return prepare(tiny(), 3)


@functools.cache
def constant(keep: tuple[bool, ...], scope: str) -> Model:
    """`tiny` with routers that choose the same layers for every prompt."""
    decision = Decision(always_keep=())
    return with_depth(_prepared(), Skipper(static_routers(keep, WIDTH), scope, decision))


@functools.cache
def random_routers(scope: str) -> Model:
    """`tiny` with routers that choose by what they read; the first layer always runs."""
    w = jax.random.normal(jax.random.key(30), (LAYERS, WIDTH))
    b = jax.numpy.zeros(LAYERS)
    skipper = Skipper({"w": w, "b": b}, scope, Decision(always_keep=(0,)))
    return with_depth(_prepared(), skipper)


def deleted(keep: Sequence[bool], model: Model | None = None) -> Model:
    """`tiny` (or another) without the layers that are not kept."""
    model = model or tiny()
    kept = [i for i, k in enumerate(keep) if k]
    blocks = jax.tree.map(lambda leaf: leaf[jax.numpy.asarray(kept)], model.params["blocks"])
    return dataclasses.replace(
        model,
        params={**model.params, "blocks": blocks},
        config=dataclasses.replace(model.config, num_layers=len(kept)),
    )


def plain(done: Sequence[Completion]) -> list:
    """What completions say."""
    return [(c.tokens, c.text, c.finish_reason) for c in done]
