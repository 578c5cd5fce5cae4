"""A frozen teacher for pretraining: a model that opens, or any Flax model through a factory."""

import dataclasses
import importlib
from typing import Any

import jax

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.core.mesh import param_shardings, replicated
from jaxreason.core.precision import as_dtype
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.recipes import open_model
from jaxreason.train import manifest
from jaxreason.train.phase import FrozenModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Where a frozen teacher comes from: a model's `path`, or a `factory` for any Flax model."""

    path: str = ""
    """A run's folder, a checkpoint (trained here or converted), a Hugging Face folder or a .gguf
    file."""
    step: int | None = None
    """Which checkpoint of the run; None takes the newest."""
    factory: str = ""
    """`package.module:function` returning a FlaxTeacher; its code is run."""
    shape: ModelConfig | None = None
    """The teacher's shape where no teacher is named: enough for --compile_for, not for training."""
    cache_dir: str = ""
    """Folder for the teacher's states of each batch: a later run on the same rows reads them and
    does not run the teacher. Two bytes a token and feature in bfloat16. Empty keeps none."""

    def validate(self) -> None:
        """Raises UserError when both sources are named."""
        if self.path and self.factory:
            raise UserError("teacher.path and teacher.factory are both set; keep one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlaxTeacher:
    """What a factory returns: `(params, apply)` of `models.adapter`, and facts about it."""

    params: Any
    apply: Any
    num_layers: int
    tokenizer_fingerprint: str
    forward_flops: int = 0
    hidden_flops: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher that is ready: the frozen model, its depth, and facts for the report.

    `hidden_flops` a token is its forward without the output projection, which LET does not use.
    """

    frozen: FrozenModel
    hidden_flops: int
    num_layers: int
    num_params: int
    tokenizer_fingerprints: tuple[str, ...]
    facts: dict[str, Any]
    identity: str = ""
    """What it computes beside its parameters' values: settings, or a factory's name."""
    step: int | None = None


def open_teacher(cfg: TeacherConfig, *, seq_len: int, dtype: str, mesh) -> Teacher | None:
    """Finds and describes the teacher; its parameters are read when its phase begins."""
    if cfg.factory:
        return _from_factory(cfg.factory, mesh)
    return _from_model(cfg, seq_len, dtype, mesh) if cfg.path else None


def check_tokenizer(teacher: Teacher, fingerprint: str) -> None:
    """Raises UserError when the teacher reads other tokens than the student."""
    if fingerprint not in teacher.tokenizer_fingerprints:
        known = teacher.tokenizer_fingerprints
        raise UserError(
            f"the teacher's tokenizer {known[0][:12] if known else '(none)'} is not the student's "
            f"{fingerprint[:12]}: token positions would not match; train the student with the "
            "teacher's tokenizer (data.tokenizer) or choose another teacher"
        )


def _from_model(cfg: TeacherConfig, seq_len: int, dtype: str, mesh) -> Teacher:
    opened, load_params = open_model.inspect(cfg.path, step=cfg.step)
    open_model.check_whole(opened, cfg.path, "a teacher")
    model = _resolve(opened.config, seq_len, dtype, mesh)
    if model.positions == "learned" and seq_len > model.max_positions:
        raise UserError(
            f"the teacher {cfg.path} has {model.max_positions} positions, data.seq_len is "
            f"{seq_len}; shorten it or choose another teacher"
        )
    step = opened.source.get("step")
    return Teacher(
        **_decoder_parts(model, lambda: load_params("float32", mesh), seq_len, dtype, mesh),
        tokenizer_fingerprints=open_model.fingerprints(opened.tokenizer),
        facts={"teacher": str(cfg.path), "teacher_step": step},
        identity=repr(model),
        # A path to one checkpoint, or to a model from elsewhere, names it already.
        step=None if manifest.is_complete(manifest.absolute(cfg.path)) else step,
    )


def teacher_of_shape(shape: ModelConfig, *, seq_len: int, dtype: str, mesh) -> Teacher:
    """A teacher to compile with and not to run: it has a shape and no weights."""

    def load():
        raise UserError("a teacher of teacher.shape has no weights; set teacher.path to train")

    return Teacher(
        **_decoder_parts(_resolve(shape, seq_len, dtype, mesh), load, seq_len, dtype, mesh),
        tokenizer_fingerprints=(),
        facts={"teacher": "teacher.shape"},
    )


def _resolve(shape: ModelConfig, seq_len: int, dtype: str, mesh) -> ModelConfig:
    platform = mesh.devices.flat[0].platform
    return decoder.resolve(shape, platform, dtype=as_dtype(dtype), seq_len=seq_len)


def _decoder_parts(model: ModelConfig, load, seq_len: int, dtype: str, mesh) -> dict[str, Any]:
    """The fields of a Teacher that follow from a decoder's shape."""
    specs = decoder.specs(model)
    abstract = P.abstract(specs, param_shardings(specs, mesh))

    def apply(params, batch, capture):
        return decoder.forward(params, model, batch, dtype=as_dtype(dtype), capture=capture)

    return {
        "frozen": FrozenModel(load, apply, decoder.forward_flops(model, seq_len), abstract),
        "hidden_flops": decoder.forward_flops(model, seq_len, depth=model.num_layers),
        "num_layers": model.num_layers,
        "num_params": P.count(specs),
    }


def _from_factory(name: str, mesh) -> Teacher:
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"teacher.factory {name!r} cannot be imported ({error}); expected "
            "package.module:function"
        ) from error
    if not isinstance(made, FlaxTeacher):
        raise UserError(
            f"teacher.factory {name!r} returned a {type(made).__name__}; expected a FlaxTeacher"
        )
    # Kept on the host: on the devices only while its phase lasts, every device with all of it.
    params, foreign = jax.device_get(made.params), made.apply

    def load_params():
        return jax.device_put(params, replicated(mesh))

    def apply(params, batch, capture):
        outputs = foreign(params, batch, capture)
        if missing := [layer for layer in capture if layer not in outputs.captured]:
            raise UserError(
                f"teacher.factory {name!r} gives no hidden state of layer {missing[0]}; put it "
                "into Outputs.captured, or use a pairing of the last layer (L2E, L2M, L2L)"
            )
        return outputs

    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), params
    )
    return Teacher(
        frozen=FrozenModel(load_params, apply, made.forward_flops, abstract),
        hidden_flops=made.hidden_flops or made.forward_flops,
        num_layers=made.num_layers,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        tokenizer_fingerprints=(made.tokenizer_fingerprint,),
        facts={"teacher": name},
        identity=name,
    )
