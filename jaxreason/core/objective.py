"""The contract of a training objective: sums and denominators, so that accumulation is exact."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxreason.core.errors import UserError
from jaxreason.core.outputs import Outputs

Batch = Mapping[str, jax.Array]
Schedule = optax.Schedule


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss `sum_k c_k(step) * S_k / max(W_k, 1)` as a value made of pure functions.

    `denominators(batch) -> {term: W_k}` sees no parameters and is computed once over the global
    batch. `terms(outputs, frozen, batch, aux_state, key, step) -> (sums, metrics, aux_update)` is
    computed a micro-batch: `sums` {term: S_k}; `metrics` {name: (sum, weight)}, added up over
    micro-batches and divided at the end; `aux_update` replaces `aux_state` (None: none). A
    micro-batch sees what the one before it made of `aux_state`; a skipped step undoes them all.
    `frozen` maps the names of the phase's frozen models to their `Outputs`, outside the gradient.
    `coefficients` are optax schedules. `captures` are the layers of the model it reads, `needs` the
    fields of the batch, `frozen_captures` the layers it reads of each frozen model.
    """

    denominators: Callable[[Batch], dict[str, jax.Array]]
    terms: Callable[..., tuple[dict[str, jax.Array], dict[str, Any], Any]]
    coefficients: Mapping[str, Schedule]
    captures: tuple[int, ...] = ()
    frozen_captures: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ("tokens", "targets", "loss_weights")
    init_aux: Callable[[], Any] = lambda: None

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Raises UserError, before anything is compiled, when a field is missing."""
        missing = [name for name in self.needs if name not in batch]
        if missing:
            raise UserError(
                f"the objective needs the batch field(s) {', '.join(missing)}, the data gives "
                f"{', '.join(sorted(batch))}; choose a source that provides them"
            )


def combine(*objectives: Objective) -> Objective:
    """The sum of objectives whose terms have different names; captures and needs are united."""
    coefficients: dict[str, Schedule] = {}
    for objective in objectives:
        doubled = coefficients.keys() & objective.coefficients.keys()
        if doubled:
            raise ValueError(f"two objectives share the term(s) {sorted(doubled)}")
        coefficients |= objective.coefficients
    frozen: dict[str, tuple[int, ...]] = {}
    for objective in objectives:
        for name, layers in objective.frozen_captures.items():
            frozen[name] = tuple(sorted({*frozen.get(name, ()), *layers}))

    def denominators(batch):
        return {k: v for o in objectives for k, v in o.denominators(batch).items()}

    def terms(outputs: Outputs, frozen_outputs, batch, aux_state, key, step):
        sums, metrics, updates = {}, {}, []
        for i, objective in enumerate(objectives):
            s, m, u = objective.terms(
                outputs, frozen_outputs, batch, aux_state[i], jax.random.fold_in(key, i), step
            )
            sums, metrics = sums | s, metrics | m
            updates.append(aux_state[i] if u is None else u)
        return sums, metrics, tuple(updates)

    return Objective(
        denominators=denominators,
        terms=terms,
        coefficients=coefficients,
        captures=tuple(sorted({c for o in objectives for c in o.captures})),
        frozen_captures=frozen,
        needs=tuple(sorted({n for o in objectives for n in o.needs})),
        init_aux=lambda: tuple(o.init_aux() for o in objectives),
    )


def weighted_total(objective: Objective, sums, denominators, step) -> jax.Array:
    """`sum_k c_k(step) * S_k / max(W_k, 1)` in float32, of one micro-batch."""
    total = jnp.float32(0)
    for name, schedule in objective.coefficients.items():
        weight = jnp.asarray(schedule(step), jnp.float32)
        total += weight * sums[name] / jnp.maximum(denominators[name], 1.0)
    return total
