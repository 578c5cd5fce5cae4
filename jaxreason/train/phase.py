"""A run is a sequence of phases; the active one is a pure function of the step."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from jaxreason.core.objective import Objective
from jaxreason.core.outputs import Outputs

# forward(params, batch, capture, key=None) -> Outputs; `params` holds all groups, `key` is the
# step's and None outside training; in training `batch` also has the step (`step`, int32[]).
Forward = Callable[..., Outputs]


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A model that a phase reads and never trains, such as a teacher.

    `load()` puts its parameters on the devices when the phase begins; they are dropped when it
    ends. `apply(params, batch, capture) -> Outputs`. `forward_flops` a token, for the accounts.
    Without `apply` it is a part of the trained model itself that stays as it is (the base under
    adapters): the phase's forward sees its parameters as the group of its name. `abstract`:
    shapes and shardings of what `load` gives, for who compiles a step without loading.
    """

    load: Callable[[], Any]
    apply: Callable[[Any, Mapping[str, Any], tuple[int, ...]], Outputs] | None
    forward_flops: int = 0
    abstract: Any = None


@dataclasses.dataclass(frozen=True)
class Phase:
    """The steps before `until` (and from the previous phase's `until` on), compiled once.

    `optimisers` maps a top-level group of the parameters to its optimiser: those groups are
    trained, gradients run over them only, and no other group's optimiser state is touched.
    `forward` is the phase's own, where the model runs otherwise than in the run's other phases.
    """

    name: str
    until: int
    objective: Objective
    optimisers: Mapping[str, optax.GradientTransformation]
    frozen: Mapping[str, FrozenModel] = dataclasses.field(default_factory=dict)
    forward: Forward | None = None


def active(phases: Sequence[Phase], step: int) -> int:
    """Index of the phase whose turn it is at `step` (updates done so far)."""
    for i, phase in enumerate(phases):
        if step < phase.until:
            return i
    raise ValueError(f"step {step} is beyond the last phase, which ends at {phases[-1].until}")
