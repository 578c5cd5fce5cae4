"""Foreign models as teachers: any Flax model, Linen or NNX, as `(params, apply)`."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen
import flax.nnx
import jax

from jaxreason.core.outputs import Outputs

Apply = Callable[[Any, Mapping[str, jax.Array], tuple[int, ...]], Outputs]


def from_linen(
    module: flax.linen.Module,
    variables: Any,
    *,
    call: Callable[[Callable, Mapping[str, jax.Array]], Any],
    outputs: Callable[[Any, Any], Outputs],
) -> tuple[Any, Apply]:
    """A Linen module as `(params, apply)`.

    `call(f, batch)` calls the module with its own arguments (for example
    `lambda f, b: f(b["tokens"])`), `outputs(result, variables)` builds `Outputs` from its result.
    """

    def apply(params, batch, capture):
        result = call(lambda *args, **kw: module.apply(params, *args, **kw), batch)
        return outputs(result, params)

    return variables, apply


def from_nnx(
    model: flax.nnx.Module,
    *,
    call: Callable[[Callable, Mapping[str, jax.Array]], Any],
    outputs: Callable[[Any, Any], Outputs],
) -> tuple[Any, Apply]:
    """An NNX module as `(params, apply)`; the module itself is not held or changed."""
    graph, state = flax.nnx.split(model)

    def apply(params, batch, capture):
        result = call(flax.nnx.merge(graph, params), batch)
        return outputs(result, params)

    return state, apply
