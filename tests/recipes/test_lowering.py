"""Every phase's training step lowers for TPU and GPU, from a machine that has neither."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxreason.core import params as P
from jaxreason.models import decoder
from jaxreason.objectives.distill import Distill
from jaxreason.objectives.let import Let
from jaxreason.recipes.methods import make_phases
from jaxreason.train import state as state_lib
from jaxreason.train.optim import OptimConfig, make_optimiser
from jaxreason.train.phase import FrozenModel
from jaxreason.train.step import make_train_step

CFG = decoder.ModelConfig(vocab_size=64, d_model=32, num_layers=4, num_heads=4, d_ff=48)
TEACHER = dataclasses.replace(CFG, d_model=16, num_layers=2)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
    ("method", "optimiser"), [(Let(), "adamw"), (Let(), "muon"), (Distill(), "adamw")]
)
def test_the_step_lowers(platform, method, optimiser):
    cfg, teacher = (decoder.resolve(c, platform) for c in (CFG, TEACHER))
    assert cfg.kernels == "xla" and cfg.layers == "scan"
    specs = decoder.specs(cfg)
    apply = lambda p, b, c: decoder.forward(p, teacher, b, dtype=jnp.bfloat16, capture=c)  # noqa: E731
    phases = make_phases(
        method,
        steps=10,
        optimiser=make_optimiser(OptimConfig(name=optimiser), specs, 10),
        student_layers=cfg.num_layers,
        teacher=FrozenModel(lambda: None, apply),
        teacher_layers=teacher.num_layers,
    )
    state = jax.eval_shape(
        lambda: state_lib.create({"model": P.initialise(specs, jax.random.key(0))}, phases)
    )
    whole = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), whole)
    batch["loss_weights"] = jax.ShapeDtypeStruct((8, 16), jnp.float32)

    def forward(params, batch, capture, key=None):
        return decoder.forward(params["model"], cfg, batch, dtype=jnp.bfloat16, capture=capture)

    for phase in phases:
        frozen = {name: P.abstract(decoder.specs(teacher)) for name in phase.frozen}
        step = make_train_step(forward, phase, key=jax.random.key(1), accumulate=2, clip_norm=1.0)
        lowered = jax.jit(step).trace(state, frozen, batch).lower(lowering_platforms=(platform,))
        assert "stablehlo.while" in lowered.as_text()  # The layers are scanned.
