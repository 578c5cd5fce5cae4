"""Fine-tuning: examples -> packed rows whose prompts are not learned -> adapters, or all weights.

It starts from any model that opens. With `lora` the base stays as it is and is in no checkpoint;
`open_model` adds the adapters to it, so that a run's folder is a model like any other. The run
itself is `recipes.execute`'s.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
from etils import epath

from jaxreason import config as config_lib
from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.core.mesh import MeshConfig, check_hosts_rows, host_rows, make_mesh
from jaxreason.core.precision import resolve_dtype
from jaxreason.data.pairs_build import Pairs, open_pairs
from jaxreason.data.pairs_config import PairsConfig
from jaxreason.data.pairs_source import Item
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.model import Model
from jaxreason.models.model_config import on_any_device, shape_of
from jaxreason.nn import lora
from jaxreason.nn.lora import LoraConfig
from jaxreason.recipes import base as base_lib
from jaxreason.recipes import execute, open_model
from jaxreason.recipes.base import Base, BaseModel, identity, kept_model, open_base
from jaxreason.recipes.encode_examples import make_encode
from jaxreason.recipes.execute import RunConfig
from jaxreason.recipes.finetune_program import FinetuneProgram, describe, without_examples
from jaxreason.recipes.init import InitConfig
from jaxreason.recipes.program import check_rows, make_create, parts_of
from jaxreason.recipes.samples import write_samples
from jaxreason.train.checkpoint import CheckpointConfig
from jaxreason.train.loop import TrainConfig
from jaxreason.train.optim import OptimConfig
from jaxreason.train.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tuning of a model on prompts with completions, or on conversations."""

    run: RunConfig = RunConfig()
    """Folder, seed, title."""
    init: InitConfig = InitConfig()
    """The model to fine-tune. Under adapters it is read whenever the run goes on."""
    model: ModelConfig = ModelConfig()
    """Its forms (kernels, attention, remat and the like); the shape is taken from it."""
    base: BaseModel = BaseModel()
    """What that model is; filled in when the run begins."""
    data: PairsConfig = PairsConfig()
    """Examples, split, rows."""
    lora: LoraConfig | None = LoraConfig()
    """Adapters that are trained in place of the weights; None trains all weights."""
    optim: OptimConfig = OptimConfig(learning_rate=2e-4, warmup_steps=20, weight_decay=0.0)
    """Optimiser and learning rate (of adapters; all weights want about a tenth of it)."""
    train: TrainConfig = TrainConfig()
    """Length and rhythm."""
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
        """Whether the base's weights are in no checkpoint."""
        return self.lora is not None

    def validate(self) -> None:
        """Raises UserError for parts that do not fit together."""
        if self.data.batch_size % self.train.accumulate:
            raise UserError(
                f"data.batch_size {self.data.batch_size} is not a multiple of train.accumulate "
                f"{self.train.accumulate}; change one of them"
            )
        if self.lora is not None and self.optim.name == "muon":
            raise UserError(
                "optim.name is muon, which is for whole matrices; set it to adamw or sgd, or lora "
                "to None"
            )


@dataclasses.dataclass
class Parts:
    """What every run on examples opens first; `cfg` is resolved."""

    cfg: Any
    mesh: Any
    base: Base
    pairs: Pairs
    hosts: dict[str, int]
    """This host's part of the rows, for `pairs.dataset`."""


def open_parts(cfg: Any, *, frozen: bool, items: Sequence[Item] | None = None) -> Parts:
    """Opens the base and the examples of a config; `items` stand in for those of its source.

    Raises:
      UserError: the base, the mesh, the rows or the examples do not fit.
    """
    mesh = make_mesh(cfg.mesh)
    check_rows(cfg, mesh)
    check_hosts_rows(mesh, cfg.data.batch_size)
    part, parts = host_rows(mesh)
    base = open_base(cfg, frozen=frozen)
    cfg = dataclasses.replace(
        cfg, init=base.init, model=base.shape, base=base.card,
        compute_dtype=resolve_dtype(cfg.compute_dtype),
    )  # fmt: skip
    encode = make_encode(base.model, cfg.data, date=base.card.date)
    pairs = open_pairs(cfg.data, base.tokenizer, encode, items=items, process_count=parts)
    largest = max(int(store.tokens.max()) for store in pairs.stores.values())
    if largest >= cfg.model.vocab_size:
        raise UserError(
            f"the examples have the token {largest}, the model {cfg.init.path} embeds "
            f"{cfg.model.vocab_size}; use a model whose tokenizer fits it"
        )
    base = dataclasses.replace(base, facts=base.facts | learned_facts(pairs, cfg.train.steps))
    return Parts(cfg, mesh, base, pairs, {"process_index": part, "process_count": parts})


def learned_facts(pairs: Pairs, steps: int) -> dict[str, float]:
    """How many tokens are learned (the sum of the loss weights): in a step and in `steps` of them,
    by the mean of a pass over the train examples, and what share of that pass's tokens they are."""
    store, rows = pairs.stores["train"], pairs.dataset("train").num_rows
    assert store.learned is not None
    first = store.offsets[:-1]  # No token stands before it, so it is no target.
    targets = int(store.learned.sum() - store.learned[first].sum())
    in_a_step = targets / rows * pairs.cfg.batch_size
    return {
        "learned_tokens_per_step": round(in_a_step, 1),
        "learned_tokens": round(in_a_step * steps),
        "learned_share": round(targets / len(store.tokens), 4),
    }


@dataclasses.dataclass
class Built(FinetuneProgram, execute.Built):
    """A run's parts, ready for the loop."""

    pairs: Pairs

    def notes(self) -> list[str]:
        """Lines to show when the run begins."""
        return [*self.pairs.notes(), *base_lib.notes(self.cfg)]

    def write_samples(self, directory: epath.Path, state: TrainState) -> None:
        """What the trained model makes of held-out prompts, for the report."""
        params = self.groups(state)
        if self.cfg.lora is not None:
            params = {"model": lora.merge(params["model"], params["lora"], self.cfg.lora)}
        write_samples(
            directory, params["model"], self.cfg.model, self.held_out,
            dtype=self.cfg.compute_dtype, count=self.cfg.run.samples,
            prompts=self.pairs.prompts("held_out", self.cfg.run.samples),
            eos_ids=self.cfg.base.eos_ids,
        )  # fmt: skip


def build(cfg: FinetuneConfig, *, items: Sequence[Item] | None = None) -> Built:
    """Opens the base, the examples and the mesh, and describes the state; trains nothing.

    `items` are examples to take in place of the config's source.

    Raises:
      UserError: parts do not fit together.
    """
    parts = open_parts(cfg, frozen=cfg.lora is not None, items=items)
    cfg, mesh, base, pairs = parts.cfg, parts.mesh, parts.base, parts.pairs
    load = base.loader(mesh)
    program = describe(cfg, mesh, load)
    train_data = pairs.dataset("train", **parts.hosts)
    program.phases[0].objective.check_batch(train_data.batch(0))
    create = make_create(program.specs, program.phases, cfg.run.seed)
    initialise = jax.jit(create, out_shardings=program.shardings, donate_argnums=0)
    return Built(
        **parts_of(program),
        train_data=train_data,
        held_out=pairs.dataset("held_out", **parts.hosts),
        init_state=lambda: initialise({"model": load()} if cfg.lora is None else {}),
        fingerprint={
            "model": shape_of(cfg.model),
            "tokenizer": base.tokenizer.fingerprint,
            "base": cfg.base.sha256,
            "lora": None if cfg.lora is None else dataclasses.asdict(cfg.lora),
        },
        files=base.model.files,
        facts={**base.facts, **pairs.counts, "params_trained": P.count(program.specs)},
        pairs=pairs,
    )


def program_for(cfg: FinetuneConfig, devices: Sequence[Any]) -> FinetuneProgram:
    """The run's program on devices that need not be here; reads no examples and no weights."""
    return describe(*without_examples(cfg, devices))


def run(cfg: FinetuneConfig, *, command: str = "") -> epath.Path:
    """Fine-tunes, or goes on where the run's folder stands; returns the report's path."""
    return execute.run(cfg, build, command=command)


def inspect_run(
    saved: FinetuneConfig, folder: epath.Path, meta: dict
) -> tuple[Model, open_model.Load]:
    """A checkpoint of a run as a model: the weights, or the base with the adapters added to it.

    Raises:
      UserError: the base is gone, or another model lies in its place; or the run's tokenizer.
    """
    run = folder.parent.parent
    model = kept_model(saved, run)
    if meta["model_fingerprint"]["tokenizer"] not in open_model.fingerprints(model.tokenizer):
        raise UserError(
            f"{run}/tokenizer is not the tokenizer of the checkpoint {folder.name}; put back the "
            "run's own files"
        )
    facts = {"source": str(run), "step": meta["step"], "format": "jaxreason"}
    shape = on_any_device(saved.model)
    source = {**model.source, **facts, "base": saved.init.path}
    model = dataclasses.replace(model, config=shape, source=source)
    specs, settings = decoder.specs(shape), saved.lora
    if settings is None:
        return model, lambda dtype, mesh: open_model.load_group(folder, meta, specs, dtype, mesh)
    load_base = base_of(saved, run)
    adapters = lora.specs(specs, settings)

    def load(param_dtype: str, mesh) -> Any:
        # Added in float32: what bfloat16 would round away is what was learned.
        own = open_model.load_group(folder, meta, adapters, "float32", mesh, "lora")
        merged = lora.merge(load_base("float32", mesh), own, settings)
        return open_model.cast_params(merged, param_dtype)

    return model, load


def base_of(saved: Any, run: epath.Path) -> open_model.Load:
    """What loads the frozen base of a saved run, which must be the very model that it began with.

    Raises:
      UserError: it is not there, or it is another.
    """
    init, config = saved.init, run / "config.json"
    if config.exists():  # A base that has moved since the checkpoint is named there.
        init = config_lib.load(config.read_text(), [type(saved)], where=str(config)).init
    try:
        _, load = open_model.inspect(init.path, step=init.step)
        found = identity(init.path, init.step)
    except UserError as error:
        raise UserError(
            f"the base of the run {run} does not open: {error}; where it has moved, start the "
            "run's command once with --config.init.path set to where it is now"
        ) from None
    if found != saved.base.sha256:
        raise UserError(
            f"the base of the run {run} was another model than {init.path} holds now: its weights' "
            f"hash is {found[:12]}, the run's {saved.base.sha256[:12]}; put the base back"
        )
    return load
