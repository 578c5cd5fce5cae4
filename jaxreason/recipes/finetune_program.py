"""The programs of fine-tuning: adapters beside frozen weights, or all weights, on completions.

What `recipes.finetune` runs and `recipes.compile_for` compiles. No example is read here and no
weight is loaded; `recipes.first_phases` is made of the same parts.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.core.mesh import check_divides, check_hosts_rows, make_mesh, param_shardings
from jaxreason.core.objective import Objective, combine
from jaxreason.core.precision import as_dtype, resolve_dtype
from jaxreason.data import pairs_config
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.nn import lora
from jaxreason.nn.lora import LoraConfig
from jaxreason.objectives.lm import next_token
from jaxreason.objectives.moe import router_losses
from jaxreason.recipes.base import shape_at_hand
from jaxreason.recipes.program import PAIRS, Program, assemble, check_rows, resolve_model
from jaxreason.train.optim import make_optimiser
from jaxreason.train.phase import Forward, FrozenModel, Phase


def completion_objective(cfg: Any) -> Objective:
    """Next-token prediction of the completions, and the router's losses of a model of experts."""
    plain = next_token(z_loss=cfg.z_loss, chunk=cfg.logit_chunk, sparse=True)
    moe = cfg.model.moe
    return plain if moe is None else combine(plain, router_losses(moe))


def adapted_forward(model: ModelConfig, cfg: LoraConfig, dtype: str) -> Forward:
    """The forward of a base (`params["model"]`) with its adapters (`params["lora"]`).

    With a key, as in training, inputs of the adapters are dropped.
    """

    def forward(params, batch: Mapping[str, Any], capture: tuple[int, ...] = (), key=None):
        weights = lora.attach(params["model"], params["lora"], cfg, key, batch)
        return decoder.forward(weights, model, batch, dtype=as_dtype(dtype), capture=capture)

    return forward


def adapted_flops(model: ModelConfig, seq_len: int, adapters: int) -> float:
    """FLOPs a token of one step that trains `adapters` parameters beside frozen weights.

    A frozen weight is multiplied with forward and for the gradient of its input, 2 passes in place
    of 3. Attention multiplies two inputs, both of which have a gradient (3), as has all that an
    adapter multiplies. Passed over: the first block's projections need no gradient of their input,
    and logits are not computed for most tokens that are not learned, so that a utilisation made of
    these is too high.
    """
    whole = decoder.forward_flops(model, seq_len)
    # Over a row of one token, attention counts half a key a query, in two products.
    weights = decoder.forward_flops(model, 1) - 2 * (
        model.num_heads * model.head_width * model.num_layers
    )
    return 2.0 * weights + 3.0 * (whole - weights) + 6.0 * adapters


@dataclasses.dataclass
class FinetuneProgram(Program):
    """The program of fine-tuning; the group `lora` is trained, or `model` where all weights are."""

    fields = PAIRS

    @property
    def model_flops(self) -> float:
        """FLOPs of one step."""
        if "lora" not in self.specs:
            return super().model_flops
        adapters = P.count(self.specs["lora"])
        return self.tokens * adapted_flops(self.model, self.cfg.data.seq_len, adapters)


def not_loaded() -> Any:
    """Stands in for what loads a base where steps are compiled and none is run."""
    raise UserError("a base that is described has no weights; start the run without --compile_for")


def frozen_base(specs: Any, mesh, load: Callable[[], Any]) -> dict[str, FrozenModel]:
    """The base under what is trained, as the group `model`; `specs` are those of its parameters."""
    abstract = P.abstract(specs, param_shardings(specs, mesh))
    return {"model": FrozenModel(load, apply=None, abstract=abstract)}


def describe(cfg: Any, mesh, load: Callable[[], Any] = not_loaded) -> FinetuneProgram:
    """The program of a resolved config on a mesh; `load` puts the base's parameters there.

    Raises:
      UserError: parts do not fit together, or the mesh does not divide the model.
    """
    model = resolve_model(cfg, mesh)
    whole, forward = decoder.specs(model), None
    check_divides(whole, mesh)
    specs, frozen = {"model": whole}, {}
    if cfg.lora is not None:
        specs, frozen = {"lora": lora.specs(whole, cfg.lora)}, frozen_base(whole, mesh, load)
        check_divides(specs["lora"], mesh)
        forward = adapted_forward(model, cfg.lora, cfg.compute_dtype)
    steps = cfg.train.steps
    optimisers = {g: make_optimiser(cfg.optim, tree, steps) for g, tree in specs.items()}
    phase = Phase("finetune", steps, completion_objective(cfg), optimisers, frozen, forward)
    return assemble(FinetuneProgram, cfg, mesh, model, specs, (phase,))


def without_examples(cfg: Any, devices: Sequence[Any]) -> tuple[Any, Any]:
    """A config of a run on examples, resolved for devices that need not be here, and the mesh.

    What `recipes.finetune.open_parts` does, but for the examples and the base's weights.

    Raises:
      UserError: the mesh or the rows do not fit, or the base's shape is not known.
    """
    pairs_config.check_settings(cfg.data)
    mesh = make_mesh(cfg.mesh, devices)
    check_rows(cfg, mesh)
    check_hosts_rows(mesh, cfg.data.batch_size)
    shape = shape_at_hand(cfg.init, cfg.model)
    dtype = resolve_dtype(cfg.compute_dtype, devices[0])
    return dataclasses.replace(cfg, model=shape, compute_dtype=dtype), mesh
