"""LET, late-to-early training (arXiv 2602.05393): a small model's last layer guides early layers.

    L = L_NLL + lambda(s) * L_proj
    L_proj    = - < norm(h_student^(k)), norm(interp(h_teacher)) >, mean over tokens      [paper]
    lambda(s) = lambda_0 * max(0, (S_stop - s) / S_stop)                                  [paper]

The teacher's state is interpolated linearly along the feature axis to the student's width
[reviews of the paper]; there is no learned projector. No official code was found.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.core.objective import Objective, Schedule

Interpolation = Literal["linear", "linear_align_corners"]
Pairing = Literal["L2E", "L2M", "L2L", "M2E", "M2M", "M2L"]
FINAL = -1  # The teacher's state after its final norm.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Let:
    """Late-to-early training; every choice that the paper leaves open is a field."""

    lambda_0: float = 0.1
    """Weight of the alignment at step 0 (paper: 0.1 is the best of 0.01, 0.1, 0.3, 1 and 3)."""
    pairing: Pairing = "L2E"
    """Teacher layer to student layer: Late or Middle to Early, Middle or Late (paper: L2E)."""
    student_layer: int | None = None
    """The early layer k: the residual stream after block k; None takes round(layers / 8), at least
    1 (reconstructed)."""
    stop_fraction: float = 0.5
    """S_stop as a fraction of all steps (reconstructed)."""
    stop_steps: int | None = None
    """S_stop in steps, in place of the fraction."""
    teacher_norm: bool = True
    """Whether the late teacher state is the one after the final norm (reconstructed)."""
    interpolation: Interpolation = "linear"
    """Linear interpolation along features to the student's width (reviews of the paper), with
    torch's align_corners off or on (reconstructed: off)."""

    def validate(self) -> None:
        """Raises UserError for values that mean nothing."""
        if self.lambda_0 < 0:
            raise UserError(f"method.lambda_0 is {self.lambda_0}; expected 0 or more")
        if self.student_layer is not None and self.pairing[2] != "E":
            raise UserError(
                f"method.student_layer is {self.student_layer}, but the pairing {self.pairing} "
                "names another layer; leave it out, or choose L2E or M2E"
            )
        check_stop(self.stop_fraction, self.stop_steps)


def check_stop(fraction: float, steps: int | None) -> None:
    """Raises UserError where a stage's end is neither a fraction nor a number of steps."""
    if not 0 <= fraction <= 1:
        raise UserError(f"method.stop_fraction is {fraction}; expected 0 to 1")
    if steps is not None and steps < 0:
        raise UserError(f"method.stop_steps is {steps}; expected 0 or more, or None")


def interpolation_matrix(d_from: int, d_to: int, mode: Interpolation = "linear") -> np.ndarray:
    """Weights [d_from, d_to] of 1-D linear interpolation along features, rows of torch's operator.

    Equals `torch.nn.functional.interpolate(mode="linear")`, without antialiasing on shrinking.
    """
    if mode == "linear_align_corners":
        source = np.arange(d_to) * ((d_from - 1) / max(d_to - 1, 1))
    else:
        source = np.maximum((np.arange(d_to) + 0.5) * d_from / d_to - 0.5, 0.0)
    low = np.minimum(np.floor(source).astype(int), d_from - 1)
    high = np.minimum(low + 1, d_from - 1)
    fraction = source - low
    matrix = np.zeros((d_from, d_to), np.float32)
    np.add.at(matrix, (low, np.arange(d_to)), 1 - fraction)
    np.add.at(matrix, (high, np.arange(d_to)), fraction)
    return matrix


def project(teacher_bte: jax.Array, width: int, mode: Interpolation = "linear") -> jax.Array:
    """The teacher's states [B,T,E] brought to `width`, in float32."""
    teacher = teacher_bte.astype(jnp.float32)
    if teacher.shape[-1] == width:
        return teacher
    matrix = jnp.asarray(interpolation_matrix(teacher.shape[-1], width, mode))
    return jnp.einsum("bte,ed->btd", teacher, matrix, precision=jax.lax.Precision.HIGHEST)


def cosine(a_btd: jax.Array, b_btd: jax.Array, eps: float = 1e-8) -> jax.Array:
    """Cosine similarity [B,T] over features in float32; norms are bounded below by `eps`."""
    a, b = a_btd.astype(jnp.float32), b_btd.astype(jnp.float32)
    # The bound stands inside the root: its gradient at a zero state is zero, not NaN.
    norm_a = jnp.sqrt(jnp.maximum(jnp.sum(a * a, axis=-1), eps**2))
    norm_b = jnp.sqrt(jnp.maximum(jnp.sum(b * b, axis=-1), eps**2))
    return jnp.sum(a * b, axis=-1) / (norm_a * norm_b)


def late_to_early_schedule(lambda_0: float, stop: int) -> Schedule:
    """`lambda_0 * max(0, (stop - step) / stop)`: zero from `stop` on; everywhere if stop is 0."""

    def schedule(step):
        left = (stop - jnp.asarray(step, jnp.float32)) / max(stop, 1)
        return lambda_0 * jnp.clip(left, 0.0, 1.0) * (stop > 0)

    return schedule


def alignment(
    *,
    student_layer: int,
    teacher_layer: int = FINAL,
    schedule: Schedule,
    interpolation: Interpolation = "linear",
    teacher: str = "teacher",
) -> Objective:
    """The LET term: negative cosine of the student's layer with the teacher's, over all tokens.

    `student_layer` k is the residual stream after block k; `teacher_layer` likewise, or FINAL for
    the state after the final norm. Padding (segment 0) does not count. Combine it with
    `lm.next_token`. Its gradient is zero in every block above k.
    """

    def denominators(batch):
        return {"align": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)}

    def terms(outputs, frozen, batch, aux_state, key, step):
        guide = frozen[teacher]
        late = guide.final if teacher_layer == FINAL else guide.captured[teacher_layer]
        early = outputs.captured[student_layer]
        late = jax.lax.stop_gradient(project(late, early.shape[-1], interpolation))
        tokens = (batch["segment_ids"] > 0).astype(jnp.float32)
        total = jnp.sum(tokens * cosine(early, late))
        return {"align": -total}, {"align_cosine": (total, jnp.sum(tokens))}, None

    return Objective(
        denominators=denominators,
        terms=terms,
        coefficients={"align": schedule},
        captures=(student_layer,),
        frozen_captures={teacher: () if teacher_layer == FINAL else (teacher_layer,)},
        needs=("segment_ids",),
    )


def paired_layers(
    pairing: Pairing, student_layers: int, teacher_layers: int, early: int | None = None
) -> tuple[int, int]:
    """(student layer, teacher layer) of one of the paper's six pairings, such as `L2E`.

    First letter the teacher's layer (Late: after the final norm; Middle: half), second letter the
    student's: Early is `early`, by default round(layers / 8) and at least 1; Middle half; Late the
    last block. Where exactly the paper puts them is reconstructed.
    """
    teacher = {"L": FINAL, "M": max(1, teacher_layers // 2)}[pairing[0]]
    student = {
        "E": early if early is not None else max(1, round(student_layers / 8)),
        "M": max(1, student_layers // 2),
        "L": student_layers,
    }[pairing[2]]
    return student, teacher
