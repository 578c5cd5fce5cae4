"""Logit distillation from a frozen teacher: the paper's "RKD" over a whole run, SALT's first stage.

RKD here means *reverse* knowledge distillation (a small teacher), the name used in the SALT line of
work (arXiv 2410.18779), not relational knowledge distillation.
"""

import dataclasses

import jax.numpy as jnp
import optax

from jaxreason.core.errors import UserError
from jaxreason.core.objective import Objective
from jaxreason.nn.cross_entropy import distillation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill:
    """Logit distillation for the whole run: (1 - w) CE + w KL (the LET paper's "RKD")."""

    weight: float = 0.5
    """w, in 0 to 1 (reconstructed: the paper's value is unknown)."""
    temperature: float = 1.0
    """Softmax temperature of both models (SALT's line of work uses 1)."""

    def validate(self) -> None:
        """Raises UserError for values outside their range."""
        _check(self.weight, self.temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Salt:
    """SALT (arXiv 2410.18779): logit distillation first, then plain next-token prediction."""

    weight: float = 0.5
    """w of the first stage, in 0 to 1 (reconstructed)."""
    temperature: float = 1.0
    """Softmax temperature of both models."""
    stop_fraction: float = 0.5
    """Where the first stage ends, as a fraction of all steps (reconstructed)."""
    stop_steps: int | None = None
    """Where the first stage ends, in steps, in place of the fraction."""

    def validate(self) -> None:
        """Raises UserError for values outside their range."""
        _check(self.weight, self.temperature)
        if not 0 <= self.stop_fraction <= 1:
            raise UserError(f"method.stop_fraction is {self.stop_fraction}; expected 0 to 1")
        if self.stop_steps is not None and self.stop_steps < 0:
            raise UserError(f"method.stop_steps is {self.stop_steps}; expected 0 or more, or None")


def _check(weight: float, temperature: float) -> None:
    if not 0 <= weight <= 1:
        raise UserError(f"method.weight is {weight}; expected 0 to 1")
    if temperature <= 0:
        raise UserError(f"method.temperature is {temperature}; expected above 0")


def logit_distillation(
    *, weight: float, temperature: float = 1.0, chunk: int = 0, teacher: str = "teacher"
) -> Objective:
    """`weight * T^2 * KL(p_teacher || p_student)`, mean over weighted tokens (SALT, stage 1).

    Combine it with next-token prediction at coefficient `1 - weight`.
    """

    def denominators(batch):
        return {"kl": jnp.sum(batch["loss_weights"], dtype=jnp.float32)}

    def terms(outputs, frozen, batch, aux_state, key, step):
        guide = frozen[teacher]
        kl = distillation(
            outputs.final, outputs.unembed, guide.final, guide.unembed, batch["loss_weights"],
            temperature=temperature, soft_cap=outputs.soft_cap,
            teacher_soft_cap=guide.soft_cap, chunk=chunk, kernels=outputs.kernels,
        )  # fmt: skip
        count = jnp.sum(batch["loss_weights"], dtype=jnp.float32)
        return {"kl": kl}, {"kl": (kl, count)}, None

    return Objective(
        denominators=denominators,
        terms=terms,
        coefficients={"kl": optax.constant_schedule(weight)},
        frozen_captures={teacher: ()},
    )
