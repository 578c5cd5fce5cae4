"""The programs of a run, described without data and without this machine's devices.

A run compiles and calls them; `recipes.compile_for` compiles the same ones for a mesh of devices
that are elsewhere. Nothing here reads a file or holds an array. `describe` is pretraining's; what
other recipes run is described in `recipes.finetune_program` and `recipes.first_phases`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxreason.core import params as P
from jaxreason.core import rng
from jaxreason.core.errors import UserError
from jaxreason.core.mesh import batch_sharding, batch_shards, check_divides, param_shardings
from jaxreason.core.precision import as_dtype
from jaxreason.depth.layerskip import LayerSkipPretraining, exits_a_step
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.recipes.methods import make_phases
from jaxreason.recipes.teacher import Teacher
from jaxreason.train import state as state_lib
from jaxreason.train.aot import shard_bytes
from jaxreason.train.phase import Phase
from jaxreason.train.step import make_train_step

if TYPE_CHECKING:
    from jaxreason.recipes.pretrain import PretrainConfig

# What data.Dataset.batch gives, every field [B,T].
BATCH = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
    "loss_weights": jnp.float32,
    "example_id": jnp.int32,
}
# And where only completions are learned.
PAIRS = BATCH | {"prompt_mask": jnp.float32}


@dataclasses.dataclass
class Program:
    """A run's phases on a mesh, and the state that they map; `cfg` is resolved.

    `specs` are those of the trained groups by name.
    """

    fields: ClassVar[Mapping[str, Any]] = BATCH
    """The batch's fields, every one [B,T], and their types."""

    cfg: Any
    model: ModelConfig
    mesh: Any
    specs: dict[str, Any]
    shardings: state_lib.TrainState
    phases: tuple[Phase, ...]
    abstract_state: state_lib.TrainState
    teacher: Teacher | None
    key: jax.Array
    """The base of the steps' keys; drawn outside the mesh, whose devices may not be here."""

    @functools.cached_property
    def dtype(self):
        """The compute dtype."""
        return as_dtype(self.cfg.compute_dtype)

    def forward(self, params, batch: Mapping[str, Any], capture: tuple[int, ...] = (), key=None):
        """The trained model on a batch."""
        return decoder.forward(
            params["model"], self.model, batch, dtype=self.dtype, capture=capture
        )

    def step_fn(self, phase: Phase):
        """The jitted training step of a phase, to be called once a phase; it donates the state."""
        step = make_train_step(
            self.forward,
            phase,
            key=self.key,
            accumulate=self.cfg.train.accumulate,
            clip_norm=self.cfg.optim.clip_norm,
        )
        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))

    def arguments(self, phase: Phase) -> tuple[state_lib.TrainState, dict, dict]:
        """What a phase's step is called with: state, frozen parameters, batch, as shapes."""
        rows = (self.cfg.data.batch_size, self.cfg.data.seq_len)
        cut = batch_sharding(self.mesh)
        batch = {
            k: jax.ShapeDtypeStruct(rows, dtype, sharding=cut) for k, dtype in self.fields.items()
        }
        frozen = {name: model.abstract for name, model in phase.frozen.items()}
        return self.abstract_state, frozen, batch

    @property
    def tokens(self) -> int:
        """Tokens of one step, over all devices."""
        return self.cfg.data.batch_size * self.cfg.data.seq_len

    @property
    def model_flops(self) -> float:
        """FLOPs of one step of the trained model alone."""
        return 3.0 * self.tokens * decoder.forward_flops(self.model, self.cfg.data.seq_len)

    def flops(self, phase: Phase) -> float:
        """FLOPs of one step of a phase, teacher and early exits included."""
        frozen = sum(model.forward_flops for model in phase.frozen.values())
        method, exits = getattr(self.cfg, "method", None), 0.0
        if isinstance(method, LayerSkipPretraining):  # Each exit has logits of its own.
            unembedding = 2 * self.model.token_width * self.model.vocab_size
            exits = 3 * unembedding * exits_a_step(method, self.model.num_layers, phase.until)
        return self.model_flops + self.tokens * (frozen + exits)

    @property
    def teacher_bytes(self) -> int:
        """Bytes a device of the teacher's parameters, there while its phase lasts."""
        used = self.teacher is not None and any(phase.frozen for phase in self.phases)
        return shard_bytes(self.teacher.frozen.abstract) if used and self.teacher else 0

    def traffic(self, phase: Phase) -> float:
        """Bytes that a device's memory must move in one step of a phase, at the least.

        The state of what the phase trains is read once and written once, a frozen base is read. In
        every micro-batch a pass reads the weights that it multiplies with, gathered, in the compute
        precision: forward, backward, and forward again under remat; a teacher's forward reads its
        own. What the backward pass keeps is written and read: a layer's input under remat=full,
        attention's output too under remat=attention, else all products. Where nothing is trained
        there is no such pass. Reconstructed from the shapes; nothing is taken from the compiler.
        """
        model, mesh, state = self.model, self.mesh.shape, self.abstract_state
        width = jnp.dtype(self.dtype).itemsize
        still = {n: frozen.abstract for n, frozen in phase.frozen.items() if not frozen.apply}
        trained = {group: state.params[group] for group in phase.optimisers}
        passes = (2 if model.remat == "none" else 3) if trained else 1
        weights = passes * multiplied(still | trained, mesh)
        if model.tie_embeddings:
            table = (still | trained)["model"]["embed"]
            weights += min(passes, 2) * math.prod(table.shape) / mesh["tensor"]
        for frozen in phase.frozen.values():
            if frozen.apply:
                weights += multiplied({"": frozen.abstract}, mesh, without=("embed", "unembed"))
        kept = model.d_model
        if model.remat == "attention":
            kept += model.num_heads * model.head_width / mesh["tensor"]
        elif model.remat != "full":
            heads = (2 * model.num_heads + 2 * model.kv_heads) * model.head_width
            kept += (heads + model.d_model + 2 * model.d_ff) / mesh["tensor"]
        rows = self.tokens * mesh["tensor"] / self.mesh.size
        activations = 2 * rows * model.num_layers * kept * width if trained else 0.0
        moments = {group: state.opt_state[group] for group in phase.optimisers}
        moved = 2 * shard_bytes(dataclasses.replace(state, params=trained, opt_state=moments))
        moved += shard_bytes(still)
        return moved + self.cfg.train.accumulate * weights * width + activations


def parts_of(program: Program) -> dict[str, Any]:
    """The fields of a description, for the run that is built on it."""
    return {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}


def multiplied(groups: Mapping[str, Any], mesh, without: tuple[str, ...] = ("embed",)) -> float:
    """Elements of the weights that a device multiplies with: cut by tensor and expert alone.

    `groups` of parameters by name, as shapes with shardings; `mesh` is its axes' sizes; `without`
    names weights of a group that are looked up, or not used.
    """
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(groups):
        if P.path_name(path[1:]) in without:
            continue
        cut = [axis if isinstance(axis, tuple) else (axis,) for axis in leaf.sharding.spec]
        own = {names for names in cut if names in (("tensor",), ("expert",))}
        total += math.prod(leaf.shape) / math.prod(mesh[names[0]] for names in own)
    return total


def check_rows(cfg: Any, mesh) -> None:
    """Raises UserError unless every micro-batch gives each device the same number of rows."""
    rows = batch_shards(mesh) * cfg.train.accumulate
    if cfg.data.batch_size % rows:
        raise UserError(
            f"data.batch_size {cfg.data.batch_size} is not a multiple of mesh.data x mesh.fsdp x "
            f"mesh.expert x train.accumulate = {rows}; change one of them"
        )


def make_create(specs: dict[str, Any], phases: tuple[Phase, ...], seed: int):
    """Returns `create(params)`: the state before the first step.

    `specs` are those of all trained groups by name; groups that `params` lacks are drawn.
    """
    key = rng.named(rng.base_key(seed), "init")

    def create(params: dict[str, Any]):
        drawn = {g: P.initialise(tree, key) for g, tree in specs.items() if g not in params}
        return state_lib.create(params | drawn, phases)

    return create


def assemble[T: Program](
    kind: type[T],
    cfg: Any,
    mesh,
    model: ModelConfig,
    specs: dict[str, Any],
    phases: tuple[Phase, ...],
    teacher: Teacher | None = None,
) -> T:
    """The programs of phases that train the groups of `specs`; `model` is resolved.

    `kind` knows what the recipe's steps cost and which fields its batches have.
    """
    abstract = jax.eval_shape(lambda: make_create(specs, phases, cfg.run.seed)({}))
    lie = {group: param_shardings(tree, mesh) for group, tree in specs.items()}
    shardings = state_lib.shardings(abstract, lie, mesh)
    abstract = jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), abstract, shardings
    )
    key = rng.named(rng.base_key(cfg.run.seed), "train")
    return kind(cfg, model, mesh, specs, shardings, phases, abstract, teacher, key)


def resolve_model(cfg: Any, mesh) -> ModelConfig:
    """The model's forms on a mesh's platform, for a resolved config.

    Raises:
      UserError: the rows are longer than the model's positions.
    """
    if cfg.model.positions == "learned" and cfg.data.seq_len > cfg.model.max_positions:
        raise UserError(
            f"data.seq_len is {cfg.data.seq_len}, the model has {cfg.model.max_positions} learned "
            "positions; shorten the rows"
        )
    return decoder.resolve(
        cfg.model,
        mesh.devices.flat[0].platform,
        dtype=as_dtype(cfg.compute_dtype),
        seq_len=cfg.data.seq_len,
    )


def describe(
    cfg: "PretrainConfig", mesh, teacher: Teacher | None, optimiser: optax.GradientTransformation
) -> Program:
    """The programs of a resolved config on a mesh.

    Raises:
      UserError: parts do not fit together, or the mesh does not divide the model.
    """
    model = resolve_model(cfg, mesh)
    specs = decoder.specs(model)
    check_divides(specs, mesh)
    phases = make_phases(
        cfg.method,
        steps=cfg.train.steps,
        optimiser=optimiser,
        student_layers=cfg.model.num_layers,
        teacher=teacher.frozen if teacher else None,
        teacher_layers=teacher.num_layers if teacher else 0,
        teacher_hidden_flops=teacher.hidden_flops if teacher else 0,
        z_loss=cfg.z_loss,
        chunk=cfg.logit_chunk,
        moe=cfg.model.moe,
        model=model,
        dtype=as_dtype(cfg.compute_dtype),
    )
    return assemble(Program, cfg, mesh, model, {"model": specs}, phases, teacher)
