"""Turns a method's config into the phases of a pretraining run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from jaxreason.core.errors import UserError
from jaxreason.core.objective import Objective, combine
from jaxreason.depth import exits
from jaxreason.depth.layerskip import LayerSkipPretraining
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.nn.moe import Moe
from jaxreason.objectives import let
from jaxreason.objectives.distill import Distill, Salt, logit_distillation
from jaxreason.objectives.let import Let
from jaxreason.objectives.lm import NextToken, next_token
from jaxreason.objectives.moe import router_losses
from jaxreason.train.phase import Forward, FrozenModel, Phase

Method = NextToken | Let | Distill | Salt | LayerSkipPretraining


def stop_step(method: Let | Salt, steps: int) -> int:
    """The step at which a teacher leaves; it may lie beyond the run's end."""
    fraction = round(method.stop_fraction * steps)
    return fraction if method.stop_steps is None else method.stop_steps


def let_objective(
    method: Let, plain: Objective, stop: int, student_layers: int, teacher_layers: int
) -> Objective:
    """Next-token prediction plus the alignment of a pairing's layers."""
    student, teacher = let.paired_layers(
        method.pairing, student_layers, teacher_layers, method.student_layer
    )
    if teacher == let.FINAL and not method.teacher_norm:
        teacher = teacher_layers
    if not 1 <= student <= student_layers:
        raise UserError(
            f"method.student_layer is {student}; the student has layers 1 to {student_layers}"
        )
    align = let.alignment(
        student_layer=student,
        teacher_layer=teacher,
        schedule=let.late_to_early_schedule(method.lambda_0, stop),
        interpolation=method.interpolation,
    )
    return combine(plain, align)


def exits_forward(
    method: LayerSkipPretraining, model: ModelConfig, dtype: Any, steps: int
) -> Forward:
    """The forward of all layers, dropped by row where a key is given, whose exits can be read."""

    def forward(params, batch: Mapping[str, Any], capture: tuple[int, ...] = (), key=None):
        def run(wrap):
            return decoder.forward(
                params["model"], model, batch, dtype=dtype, capture=capture, wrap=wrap
            )

        return exits.forward(method, model, params["model"], batch, run, key=key, steps=steps)

    return forward


def make_phases(
    method: Method,
    *,
    steps: int,
    optimiser: optax.GradientTransformation,
    student_layers: int,
    teacher: FrozenModel | None = None,
    teacher_layers: int = 0,
    teacher_hidden_flops: int = 0,
    z_loss: float = 0.0,
    chunk: int = 0,
    moe: Moe | None = None,
    model: ModelConfig | None = None,
    dtype: Any = jnp.float32,
) -> tuple[Phase, ...]:
    """One phase with the teacher, where the method has one, and one without.

    LayerSkip, which has a forward of its own, needs the resolved `model` and the compute `dtype`.

    A teacher whose weight is zero is never run: lambda_0 = 0 or w = 0 is the baseline itself.
    The losses of the trained model's router, where it has experts, belong to every phase.
    """
    routers = () if moe is None else (router_losses(moe),)
    plain = next_token(z_loss=z_loss, chunk=chunk)
    plain = combine(plain, *routers) if routers else plain
    trained = {"model": optimiser}
    alone = Phase("next_token", steps, plain, trained)
    if isinstance(method, LayerSkipPretraining):
        if model is None:
            raise ValueError("LayerSkip's phase needs the model's config")
        method.check(student_layers)
        loss = exits.with_exits(method, plain, student_layers, steps, z_loss=z_loss, chunk=chunk)
        forward = exits_forward(method, model, dtype, steps)
        return (Phase("layerskip", steps, loss, trained, forward=forward),)
    strength = method.lambda_0 if isinstance(method, Let) else getattr(method, "weight", 0.0)
    if isinstance(method, NextToken) or strength == 0:
        return (alone,)
    if teacher is None:
        raise UserError(
            f"method.{type(method).__name__} needs a teacher; set --config.teacher.path to a run "
            "or a checkpoint"
        )
    frozen = {"teacher": teacher}
    if isinstance(method, Let):
        stop = stop_step(method, steps)
        objective = let_objective(method, plain, stop, student_layers, teacher_layers)
        if teacher_hidden_flops:  # No output projection: only hidden states are aligned.
            frozen = {"teacher": dataclasses.replace(teacher, forward_flops=teacher_hidden_flops)}
        guided = Phase("let", min(stop, steps), objective, trained, frozen)
    else:
        objective = combine(
            next_token(
                z_loss=z_loss, chunk=chunk,
                coefficient=optax.constant_schedule(1 - method.weight),
            ),
            logit_distillation(
                weight=method.weight, temperature=method.temperature, chunk=chunk
            ),
            *routers,
        )  # fmt: skip
        stop = steps
        if isinstance(method, Salt):
            stop = min(stop_step(method, steps), steps)
        guided = Phase("distill", stop, objective, trained, frozen)
    phases = (guided,) if guided.until else ()
    return phases if guided.until >= steps else (*phases, alone)
