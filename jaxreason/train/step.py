"""One training step: denominators, micro-batches, gradient, clip, update, guard."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxreason.core.objective import weighted_total
from jaxreason.train.phase import Forward, Phase
from jaxreason.train.state import TrainState


def make_train_step(
    forward: Forward, phase: Phase, *, key: jax.Array, accumulate: int = 1, clip_norm: float = 0.0
) -> Callable:
    """Returns `train_step(state, frozen_params, batch) -> (state, metrics)`, to be jitted.

    `forward(params, batch, capture, key)` sees all groups of the parameters, the step's key and the
    step itself as `batch["step"]`; a phase's own forward goes before it. `accumulate` micro-batches
    give the gradient of the whole batch, since every term is divided by the whole batch's
    denominator. `clip_norm` bounds the gradient's norm over all trained groups; 0 does not.
    A step whose gradient or loss is not finite changes nothing but the counters.
    """
    objective, forward = phase.objective, phase.forward or forward

    def train_step(state: TrainState, frozen_params, batch):
        denominators = objective.denominators(batch)
        trained = {g: state.params[g] for g in phase.optimisers}
        aux, step_key = state.aux_state[phase.name], jax.random.fold_in(key, state.step)

        def loss_of(trained, micro, aux):
            frozen = {
                name: model.apply(frozen_params[name], micro, objective.frozen_captures[name])
                for name, model in phase.frozen.items()
                if model.apply is not None
            }
            still = {n: frozen_params[n] for n, model in phase.frozen.items() if not model.apply}
            groups = {**still, **state.params, **trained}
            seen = {**micro, "step": state.step}
            outputs = forward(groups, seen, objective.captures, step_key)
            sums, metrics, update = objective.terms(
                outputs, jax.lax.stop_gradient(frozen), micro, aux, step_key, state.step
            )
            total = weighted_total(objective, sums, denominators, state.step)
            return total, (metrics | {"total": (total, None)}, aux if update is None else update)

        grad = jax.grad(loss_of, has_aux=True)
        grads, metrics, aux_new = _accumulated(grad, trained, batch, aux, accumulate)
        norm = optax.tree.norm(grads)
        if clip_norm:
            scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt = {}, {}
        for g, tx in phase.optimisers.items():
            updates[g], opt[g] = tx.update(grads[g], state.opt_state[g], trained[g])
        ratios = _update_ratios(updates, trained)
        ok = jnp.isfinite(norm + metrics["total"][0] + sum(ratios.values()))
        new = optax.apply_updates(trained, updates)
        keep = lambda a, b: jax.tree.map(lambda x, y: jnp.where(ok, x, y), a, b)  # noqa: E731
        new_state = TrainState(
            step=state.step + 1,
            params={**state.params, **keep(new, trained)},
            opt_state={**state.opt_state, **keep(opt, {g: state.opt_state[g] for g in opt})},
            aux_state={**state.aux_state, phase.name: keep(aux_new, aux)},
            skipped=state.skipped + ~ok,
            streak=jnp.where(ok, 0, state.streak + 1),
        )
        return new_state, _report(phase, metrics, state, new_state) | ratios | {"grad_norm": norm}

    return train_step


def _accumulated(grad, trained, batch, aux, accumulate: int):
    """Sums gradients and metrics over micro-batches, one after the other."""
    if accumulate == 1:
        grads, (metrics, aux) = grad(trained, batch, aux)
        return grads, metrics, aux
    # Rows b, b + A, b + 2A, ... make one micro-batch: each device keeps rows of its own.
    split = lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)  # noqa: E731

    def body(carry, micro):
        grads, metrics, aux = carry
        g, (m, aux) = grad(trained, micro, aux)
        add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731
        return (add(grads, g), add(metrics, m), aux), None

    micros = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], micros)
    g, (m, _) = jax.eval_shape(grad, trained, first, aux)
    zeros = lambda tree: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)  # noqa: E731
    (grads, metrics, aux), _ = jax.lax.scan(body, (zeros(g), zeros(m), aux), micros)
    return grads, metrics, aux


def _update_ratios(updates, params) -> dict[str, jax.Array]:
    """Norm of the update over norm of the parameters, by part of the model."""
    return {
        f"update_ratio/{group}/{part}": optax.tree.norm(updates[group][part])
        / jnp.maximum(optax.tree.norm(before), 1e-12)
        for group in updates
        for part, before in params[group].items()
    }


def _report(phase: Phase, metrics, old: TrainState, new: TrainState):
    """Scalars of the step: means of the metrics, coefficients, counters."""
    out = {
        name: total if weight is None else total / jnp.maximum(weight, 1.0)
        for name, (total, weight) in metrics.items()
    }
    for name, schedule in phase.objective.coefficients.items():
        out[f"coefficient/{name}"] = jnp.asarray(schedule(old.step), jnp.float32)
    return out | {"skipped": new.skipped, "streak": new.streak}
