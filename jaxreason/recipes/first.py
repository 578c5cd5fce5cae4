"""Fewer layers by prompt: routers on a frozen base, then adapters under the routers' decisions.

FiRST (arXiv 2410.12513) and its peers, which skip the same layers for every input, are trained by
one config and one command; a finished run opens as a model whose `depth` chooses its layers. Base,
examples and adapters are `recipes.finetune`'s, the run itself is `recipes.execute`'s.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.core.mesh import MeshConfig
from jaxreason.data.pairs_build import Pairs
from jaxreason.data.pairs_config import PairsConfig
from jaxreason.data.pairs_source import Item
from jaxreason.depth import first, sets
from jaxreason.depth.block_influence import block_influence
from jaxreason.depth.decision import Scope, static_routers
from jaxreason.depth.evenly import Evenly
from jaxreason.depth.first import FirstConfig
from jaxreason.depth.layerskip import LayerSkip
from jaxreason.depth.sets import AllLayers, BlockInfluence, RandomLayers, SkipCost, Unified
from jaxreason.depth.skip_cost import skip_costs
from jaxreason.eval.perplexity import make_eval_step, perplexity
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.model import Model
from jaxreason.models.model_config import shape_of
from jaxreason.nn import lora
from jaxreason.nn.lora import LoraConfig
from jaxreason.recipes import base as base_lib
from jaxreason.recipes import execute, finetune, open_model
from jaxreason.recipes.base import BaseModel
from jaxreason.recipes.execute import RunConfig
from jaxreason.recipes.finetune_program import without_examples
from jaxreason.recipes.first_phases import (
    SkippingProgram,
    describe,
    make_exits_forward,
    make_forward,
)
from jaxreason.recipes.init import InitConfig
from jaxreason.recipes.program import make_create, parts_of
from jaxreason.recipes.samples import write_samples
from jaxreason.train.checkpoint import CheckpointConfig
from jaxreason.train.loop import TrainConfig
from jaxreason.train.optim import OptimConfig, make_schedule
from jaxreason.train.phase import active
from jaxreason.train.state import TrainState

INFLUENCE_BATCHES, COST_BATCHES = 4, 2
"""Training batches that FiRST's first order of layers is measured on, as many as the peers'."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkippingConfig:
    """A model that is trained to run fewer layers."""

    run: RunConfig = RunConfig()
    """Folder, seed, title."""
    init: InitConfig = InitConfig()
    """The model to start from; it is read whenever the run goes on."""
    model: ModelConfig = ModelConfig()
    """Its forms (kernels, attention, remat and the like); the shape is taken from it."""
    base: BaseModel = BaseModel()
    """What that model is; filled in when the run begins."""
    data: PairsConfig = PairsConfig()
    """Examples, split, rows."""
    method: (
        FirstConfig
        | AllLayers
        | Unified
        | Evenly
        | RandomLayers
        | BlockInfluence
        | SkipCost
        | LayerSkip
    ) = FirstConfig()
    """What chooses the layers: routers that are trained, or a set that ignores the input."""
    router_steps: int = 200
    """Updates of FiRST's first stage, in which routers learn and the base rests (reconstructed).
    The peers have no such stage."""
    lora: LoraConfig | None = LoraConfig()
    """Adapters, trained under the decisions in the updates that are left; None ends with the
    routers, or at once for the peers, of which then nothing is trained."""
    router_optim: OptimConfig = OptimConfig(learning_rate=3e-3, warmup_steps=20, weight_decay=0.0)
    """Optimiser and learning rate of the routers (reconstructed)."""
    optim: OptimConfig = OptimConfig(learning_rate=2e-4, warmup_steps=20, weight_decay=0.0)
    """Optimiser and learning rate of the adapters (reconstructed); its clip_norm holds for both."""
    train: TrainConfig = TrainConfig(steps=400)
    """Length (of both stages together) and rhythm."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save, what to keep."""
    mesh: MeshConfig = MeshConfig()
    """Parallelism."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto, bfloat16 or float32; parameters are always float32."""
    z_loss: float = 0.0
    """Weight of the squared log-partition (PaLM uses 1e-4)."""
    logit_chunk: int = 0
    """Tokens a row whose float32 logits are held at once; 0 chooses by size."""

    @property
    def frozen_base(self) -> bool:
        """The base's weights are in no checkpoint."""
        return True

    @property
    def first_stage(self) -> int:
        """The updates of the first stage; 0 for the peers."""
        return self.router_steps if isinstance(self.method, FirstConfig) else 0

    @property
    def gating(self) -> FirstConfig:
        """How the routers, or what stands for them, are taken at their word."""
        method = self.method
        return method if isinstance(method, FirstConfig) else sets.gating(method)

    def validate(self) -> None:
        """Raises UserError for parts that do not fit together."""
        if self.data.batch_size % self.train.accumulate:
            raise UserError(
                f"data.batch_size {self.data.batch_size} is not a multiple of train.accumulate "
                f"{self.train.accumulate}; change one of them"
            )
        for name, optim in (("router_optim", self.router_optim), ("optim", self.optim)):
            if optim.name == "muon":
                raise UserError(
                    f"{name}.name is muon, which is for whole matrices; set it to adamw or sgd"
                )
        stage, steps = self.first_stage, self.train.steps
        if isinstance(self.method, FirstConfig) and stage < 1:
            raise UserError(f"router_steps is {stage}; expected 1 or more")
        if self.lora is not None and stage >= steps:
            raise UserError(
                f"train.steps is {steps} and router_steps {stage}, which leaves no update for the "
                "adapters; raise train.steps, or set lora to None"
            )
        if self.lora is None and steps != max(stage, 1):
            what = "only routers are trained" if stage else "nothing is trained"
            raise UserError(
                f"lora is None, so {what}, and train.steps is {steps}; set it to {max(stage, 1)}"
            )


@dataclasses.dataclass
class Built(SkippingProgram, execute.Built):
    """A run's parts, ready for the loop."""

    pairs: Pairs

    def notes(self) -> list[str]:
        """Lines to show when the run begins."""
        return [*self.pairs.notes(), *base_lib.notes(self.cfg)]

    def learning_rate(self, step: int) -> Any:
        """The active phase's learning rate after `step` updates, for the report."""
        phases, cfg = self.phases, self.cfg
        phase = phases[active(phases, min(step, phases[-1].until - 1))]
        begin = 0 if phase is phases[0] else phases[0].until
        optim = cfg.router_optim if phase.name == "routers" else cfg.optim
        return make_schedule(optim, phase.until - begin)(step - begin)

    @functools.cached_property
    def _eval_step(self):
        cfg, method, chunk = self.cfg, self.cfg.method, self.cfg.logit_chunk
        forward = make_forward(cfg, self.model, hard=True)
        watch = first.watched(cfg.gating, self.model.num_layers)

        def step(params, batch):
            seen = []

            def keep_outputs(params, batch):
                seen.append(forward(params, batch))
                return seen[0]

            sums = make_eval_step(keep_outputs, chunk, True)(params, batch)
            _, metrics, _ = watch.terms(seen[0], {}, batch, None, None, 0)
            if isinstance(method, LayerSkip):  # What self-speculative decoding writes.
                whole = make_exits_forward(cfg, self.model, method)
                full = make_eval_step(whole, chunk, True)(params, batch)
                metrics["full/loss"] = (full["nll"], full["tokens"])
                metrics["full/accuracy"] = (full["correct"], full["tokens"])
            return sums, metrics

        return jax.jit(step)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Held-out loss of the model as it would run, in either stage, and the layers it runs.

        Under LayerSkip also `full/loss` and `full/accuracy`, those of all layers.
        """
        params, found, watched = self.groups(state), [], []
        for _, batch in self.held_out.iterate():
            sums, metrics = self._eval_step(params, self.put(batch))
            found.append(jax.device_get(sums))
            watched.append(jax.device_get(metrics))
        results = perplexity(lambda _, sums: sums, None, found, self.held_out.bytes_per_token)
        for name in watched[0]:
            total, weight = (sum(float(m[name][i]) for m in watched) for i in (0, 1))
            results[name] = total / max(weight, 1.0)
        return results

    def write_samples(self, directory: epath.Path, state: TrainState) -> None:
        """What the trained model makes of held-out prompts with the layers it chooses."""
        params = self.groups(state)
        weights = params["model"]
        if self.cfg.lora is not None:
            weights = lora.merge(weights, params["lora"], self.cfg.lora)
        write_samples(
            directory, weights, self.cfg.model, self.held_out,
            dtype=self.cfg.compute_dtype, count=self.cfg.run.samples,
            prompts=self.pairs.prompts("held_out", self.cfg.run.samples),
            eos_ids=self.cfg.base.eos_ids,
            depth=first.skipper(self.cfg.gating, params["routers"]),
        )  # fmt: skip


def build(cfg: SkippingConfig, *, items: Sequence[Item] | None = None) -> Built:
    """Opens the base, the examples and the mesh, and describes the state; trains nothing.

    `items` are examples to take in place of the config's source.

    Raises:
      UserError: parts do not fit together.
    """
    parts = finetune.open_parts(cfg, frozen=True, items=items)
    cfg, mesh, base, pairs = parts.cfg, parts.mesh, parts.base, parts.pairs
    _check_turns(cfg, pairs)
    load = base.loader(mesh)
    program = describe(cfg, mesh, load)
    model, train_data = program.model, pairs.dataset("train", **parts.hosts)
    for phase in program.phases:
        phase.objective.check_batch(train_data.batch(0))
    create = make_create(program.specs, program.phases, cfg.run.seed)
    initialise = jax.jit(create, out_shardings=program.shardings, donate_argnums=0)

    def run_base(params, batch, wrap):
        return decoder.forward(params, model, batch, dtype=program.dtype, wrap=wrap)

    def influence(batches: int) -> np.ndarray:
        rows = (built.put(train_data.batch(i)) for i in range(batches))
        return block_influence(run_base, load(), rows, model.num_layers)

    def costs(batches: int, always: tuple[bool, ...], scope: Scope) -> np.ndarray:
        rows = [built.put(train_data.batch(i)) for i in range(batches)]
        return skip_costs(run_base, load(), rows, always, scope=scope)

    def init_state() -> TrainState:
        method = cfg.method
        if isinstance(method, FirstConfig):
            state = initialise({})
            if method.init_order != "equal":
                routers = dict(state.params["routers"])
                if method.init_order == "influence":
                    worth = influence(INFLUENCE_BATCHES)
                else:
                    always = method.decision.always(model.num_layers)
                    worth = costs(COST_BATCHES, always, method.scope)
                bias = first.ranked_bias(method, worth)
                routers["b"] = jax.device_put(bias, routers["b"].sharding)
                state = dataclasses.replace(state, params=state.params | {"routers": routers})
            return state
        chosen = sets.choose(method, model.num_layers, influence, costs)
        return initialise({"routers": static_routers(chosen, model.d_model)})

    built = Built(
        **parts_of(program),
        train_data=train_data,
        held_out=pairs.dataset("held_out", **parts.hosts),
        init_state=init_state,
        fingerprint={
            "model": shape_of(cfg.model),
            "tokenizer": base.tokenizer.fingerprint,
            "base": cfg.base.sha256,
            "lora": None if cfg.lora is None else dataclasses.asdict(cfg.lora),
            "routers": model.num_layers,
        },
        files=base.model.files,
        facts={
            **base.facts, **pairs.counts,
            "method": type(cfg.method).__name__, "params_trained": P.count(program.specs),
        },
        pairs=pairs,
    )  # fmt: skip
    return built


def _check_turns(cfg: SkippingConfig, pairs: Pairs) -> None:
    """Raises UserError where a conversation has several learned replies.

    Generation reads and decides each reply anew; in a row there is one decision, by what stands
    before the first learned token.
    """
    if cfg.data.learned_turns == "last":
        return
    for item in (item for items in pairs.items.values() for item in items):
        replies = sum(message["role"] == "assistant" for message in getattr(item, "messages", ()))
        if replies > 1:
            raise UserError(
                f"{item.name or 'a conversation'} has {replies} replies, each of which would be "
                "decided anew in generation; set data.learned_turns=last"
            )


def program_for(cfg: SkippingConfig, devices: Sequence[Any]) -> SkippingProgram:
    """The run's programs on devices that need not be here; reads no examples and no weights."""
    return describe(*without_examples(cfg, devices))


def run(cfg: SkippingConfig, *, command: str = "") -> epath.Path:
    """Trains, or goes on where the run's folder stands; returns the report's path."""
    return execute.run(cfg, build, command=command)


def inspect_run(saved: Any, folder: epath.Path, meta: dict) -> tuple[Model, open_model.Load]:
    """A checkpoint of a run as a model: the base, with the adapters added, and its `depth`.

    `saved` is the run's SkippingConfig.

    Raises:
      UserError: the base is gone, or another model lies in its place; or the run's tokenizer.
    """
    model, load = finetune.inspect_run(saved, folder, meta)
    if saved.lora is None:
        load = finetune.base_of(saved, folder.parent.parent)
    specs = first.specs(saved.gating, saved.model.num_layers, saved.model.d_model)
    routers = open_model.load_group(folder, meta, specs, "float32", None, "routers")
    return dataclasses.replace(model, depth=first.skipper(saved.gating, routers)), load
