"""The train state: a pytree that one step maps to the next, and its shardings."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxreason.core.mesh import replicated
from jaxreason.core.params import path_name
from jaxreason.train.phase import Phase


@flax.struct.dataclass
class TrainState:
    """Arrays, or a tree of the same form that describes them (shapes, shardings).

    `step` updates tried; `params` and `opt_state` by group; `aux_state` by phase name; `skipped`
    counts non-finite steps, `streak` those in a row up to now.
    """

    step: Any
    params: dict[str, Any]
    opt_state: dict[str, Any]
    aux_state: dict[str, Any]
    skipped: Any
    streak: Any


def create(params: dict[str, Any], phases: Sequence[Phase]) -> TrainState:
    """The state before the first step, from the parameters' groups."""
    optimisers = {g: tx for phase in phases for g, tx in phase.optimisers.items()}
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state={g: tx.init(params[g]) for g, tx in optimisers.items()},
        aux_state={phase.name: phase.objective.init_aux() for phase in phases},
        skipped=jnp.int32(0),
        streak=jnp.int32(0),
    )


def shardings(abstract_state: TrainState, param_shardings, mesh) -> TrainState:
    """Shardings of a state: moments lie like their parameter, everything else is replicated.

    An optimiser's leaf belongs to the parameter of its group whose name ends the leaf's name.
    """
    whole = replicated(mesh)

    def moments(group: str, opt_state):
        known = {
            path_name(path): (leaf.shape, sharding)
            for (path, leaf), sharding in zip(
                jax.tree_util.tree_leaves_with_path(abstract_state.params[group]),
                jax.tree.leaves(param_shardings[group]),
                strict=True,
            )
        }

        def one(path, leaf):
            parts = path_name(path).split("/")
            for i in range(len(parts)):
                shape, sharding = known.get("/".join(parts[i:]), (None, None))
                if shape == leaf.shape:
                    return sharding
            return whole

        return jax.tree_util.tree_map_with_path(one, opt_state)

    return TrainState(
        step=whole,
        params=param_shardings,
        opt_state={g: moments(g, s) for g, s in abstract_state.opt_state.items()},
        aux_state=jax.tree.map(lambda _: whole, abstract_state.aux_state),
        skipped=whole,
        streak=whole,
    )
