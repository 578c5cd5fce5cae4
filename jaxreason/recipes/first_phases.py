"""The phases of a run that learns to run fewer layers, and what their steps cost.

`describe` makes the programs that `recipes.first` runs and `recipes.compile_for` compiles.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxreason.core import params as P
from jaxreason.core.mesh import check_divides
from jaxreason.core.objective import combine
from jaxreason.core.precision import as_dtype
from jaxreason.depth import exits, first, layerskip, sets
from jaxreason.depth.first import FirstConfig
from jaxreason.depth.layerskip import LayerSkip
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.nn import lora
from jaxreason.recipes.finetune_program import (
    adapted_flops,
    completion_objective,
    frozen_base,
    not_loaded,
)
from jaxreason.recipes.program import PAIRS, Program, assemble, multiplied, resolve_model
from jaxreason.train.optim import make_optimiser
from jaxreason.train.phase import Forward, FrozenModel, Phase


def make_forward(cfg: Any, model: ModelConfig, *, hard: bool) -> Forward:
    """The forward of a base (`params["model"]`) under `params["routers"]`.

    `hard`: the layers that generation would run, with the adapters (`params["lora"]`) where the
    run has any. Otherwise the gates of the first stage, on the base alone.
    """

    def forward(params, batch: Mapping[str, Any], capture: tuple[int, ...] = (), key=None):
        _, run = _wrapped(cfg, model, hard, params, batch, capture, key)
        return first.forward(cfg.gating, params["routers"], batch, run, hard=hard, key=key)

    return forward


def make_exits_forward(cfg: Any, model: ModelConfig, method: LayerSkip) -> Forward:
    """The forward of all layers with the adapters; with a key, layers are dropped by row."""

    def forward(params, batch: Mapping[str, Any], capture: tuple[int, ...] = (), key=None):
        weights, run = _wrapped(cfg, model, True, params, batch, capture, key)
        return exits.forward(method, model, weights, batch, run, key=key)

    return forward


def _wrapped(cfg: Any, model: ModelConfig, adapted: bool, params, batch, capture, key):
    """The base's weights, with adapters where the run has any, and `run(wrap)` -> Outputs."""
    weights = params["model"]
    if adapted and cfg.lora is not None:
        weights = lora.attach(weights, params["lora"], cfg.lora, key, batch)

    def run(wrap):
        dtype = as_dtype(cfg.compute_dtype)
        return decoder.forward(weights, model, batch, dtype=dtype, capture=capture, wrap=wrap)

    return weights, run


def make_phases(
    cfg: Any,
    model: ModelConfig,
    specs: Mapping[str, Any],
    frozen: Mapping[str, FrozenModel],
) -> tuple[Phase, ...]:
    """Routers, then adapters; for the peers adapters alone; without any, an update of nothing."""
    stage, steps = cfg.first_stage, cfg.train.steps
    completions = completion_objective(cfg)
    phases = []
    if stage:
        optimiser = make_optimiser(cfg.router_optim, specs["routers"], stage)
        loss = combine(completions, first.penalties(cfg.gating, model.num_layers))
        gated = make_forward(cfg, model, hard=False)
        phases.append(Phase("routers", stage, loss, {"routers": optimiser}, frozen, gated))
    if stage < steps:
        optimisers: dict[str, optax.GradientTransformation] = {}
        if cfg.lora is not None:
            optimisers = {"lora": make_optimiser(cfg.optim, specs["lora"], steps - stage)}
        if isinstance(cfg.method, LayerSkip) and optimisers:
            loss = exits.with_exits(
                cfg.method, completions, model.num_layers, steps,
                z_loss=cfg.z_loss, chunk=cfg.logit_chunk,
            )  # fmt: skip
            forward = make_exits_forward(cfg, model, cfg.method)
        else:
            loss = combine(completions, first.watched(cfg.gating, model.num_layers))
            forward = make_forward(cfg, model, hard=True)
        name = "lora" if optimisers else "nothing"
        phases.append(Phase(name, steps, loss, optimisers, frozen, forward))
    return tuple(phases)


def flops_a_token(cfg: Any, model: ModelConfig, phase: Phase, trained: int) -> float:
    """FLOPs a token of one step: every layer runs, frozen weights have no gradient of their own.

    The rule `top` reads all statistics first, and LayerSkip's exits each have their logits.
    """
    forward = float(decoder.forward_flops(model, cfg.data.seq_len))
    total = forward
    if phase.optimisers:
        total = adapted_flops(model, cfg.data.seq_len, trained)
    method = cfg.method
    total += forward * reads_ahead(cfg, phase)
    if isinstance(method, LayerSkip) and phase.optimisers:
        unembedding = 2 * model.token_width * model.vocab_size
        total += 2 * unembedding * layerskip.exits_a_step(method, model.num_layers, phase.until)
    return total


def reads_ahead(cfg: Any, phase: Phase) -> bool:
    """Whether a phase's step runs the base once more before its forward, to decide layers first."""
    hard = phase.name != "routers" or cfg.gating.form == "straight_through"
    return hard and cfg.gating.decision.rule == "top"


@dataclasses.dataclass
class SkippingProgram(Program):
    """The programs of a run that learns to skip.

    Its groups are `routers`, and `lora` where it has adapters.
    """

    fields = PAIRS

    def flops(self, phase: Phase) -> float:
        """FLOPs of one step."""
        trained = sum(P.count(self.specs[group]) for group in phase.optimisers)
        return self.tokens * flops_a_token(self.cfg, self.model, phase, trained)

    def traffic(self, phase: Phase) -> float:
        """Bytes that a device's memory must move in one step of a phase, at the least."""
        total = super().traffic(phase)
        if not reads_ahead(self.cfg, phase):
            return total
        base = {"model": phase.frozen["model"].abstract}
        blocks = multiplied(base, self.mesh.shape, without=("embed", "unembed"))
        return total + self.cfg.train.accumulate * blocks * jnp.dtype(self.dtype).itemsize


def describe(cfg: Any, mesh, load: Callable[[], Any] = not_loaded) -> SkippingProgram:
    """The programs of a resolved config on a mesh; `load` puts the base's parameters there.

    Raises:
      UserError: parts do not fit together, the mesh does not divide the model, or a method's set
        of layers cannot be had.
    """
    model = resolve_model(cfg, mesh)
    cfg.gating.decision.check(model.num_layers, cfg.gating.scope)
    if not isinstance(cfg.method, FirstConfig):  # Which layers decides values, not programs.
        equal = np.zeros(model.num_layers)
        sets.choose(cfg.method, model.num_layers, lambda _: equal, lambda *_: equal)
    whole = decoder.specs(model)
    check_divides(whole, mesh)
    specs: dict[str, Any] = {"routers": first.specs(cfg.gating, model.num_layers, model.d_model)}
    if cfg.lora is not None:
        specs["lora"] = lora.specs(whole, cfg.lora)
        check_divides(specs["lora"], mesh)
    phases = make_phases(cfg, model, specs, frozen_base(whole, mesh, load))
    return assemble(SkippingProgram, cfg, mesh, model, specs, phases)
