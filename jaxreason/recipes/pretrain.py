"""Pretraining: text -> packed batches -> a decoder -> checkpoints and a report.

A method (LET, distillation, SALT) adds a phase with a frozen teacher in front of plain next-token
prediction. The run itself is `recipes.execute`'s.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
from etils import epath

from jaxreason import data
from jaxreason.core.errors import UserError
from jaxreason.core.mesh import MeshConfig, check_hosts_rows, host_rows, make_mesh
from jaxreason.core.precision import resolve_dtype
from jaxreason.core.text import (
    Bytes,
    ByteTokenizer,
    HfJson,
    SentencePiece,
    load_hf_json,
    load_sentencepiece,
)
from jaxreason.data import DataConfig
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.model_config import shape_of
from jaxreason.objectives.lm import NextToken
from jaxreason.recipes import execute
from jaxreason.recipes.execute import RunConfig
from jaxreason.recipes.init import InitConfig, init_shape, open_init
from jaxreason.recipes.methods import Method
from jaxreason.recipes.program import Program, check_rows, describe, make_create, parts_of
from jaxreason.recipes.teacher import (
    TeacherConfig,
    check_tokenizer,
    open_teacher,
    teacher_of_shape,
)
from jaxreason.recipes.teacher_cache import CachedTeacher, with_cache
from jaxreason.train.checkpoint import CheckpointConfig
from jaxreason.train.loop import TrainConfig
from jaxreason.train.optim import OptimConfig, make_optimiser
from jaxreason.train.phase import active


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretraining of a decoder on text."""

    run: RunConfig = RunConfig()
    """Folder, seed, title."""
    model: ModelConfig = ModelConfig()
    """Shape of the model that is trained."""
    data: DataConfig = DataConfig()
    """Text, tokenizer, packing, batch."""
    init: InitConfig = InitConfig()
    """The model whose weights training starts from; random ones by default."""
    method: Method = NextToken()
    """What is added to next-token prediction."""
    teacher: TeacherConfig = TeacherConfig()
    """The frozen teacher of a method that has one."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and learning rate."""
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

    def validate(self) -> None:
        """Raises UserError for parts that do not fit together."""
        if self.data.batch_size % self.train.accumulate:
            raise UserError(
                f"data.batch_size {self.data.batch_size} is not a multiple of train.accumulate "
                f"{self.train.accumulate}; change one of them"
            )


def resolve(cfg: PretrainConfig, vocab_size: int, device: Any = None) -> PretrainConfig:
    """Fills in what decides numbers: the vocabulary's size and the compute precision.

    The forms of the parts (`model.kernels` and the like) stay `auto` where they are, so that the
    saved config runs on another kind of device; `facts.json` records what they were. `device`
    is one of those that it runs on; None is this machine's.
    """
    needed = -(-vocab_size // 64) * 64
    if not cfg.model.vocab_size:
        model = dataclasses.replace(cfg.model, vocab_size=needed)
    elif cfg.model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size is {cfg.model.vocab_size}, the tokenizer has {vocab_size} tokens; "
            f"set it to at least {vocab_size}, or to 0"
        )
    else:
        model = cfg.model
    dtype = resolve_dtype(cfg.compute_dtype, device)
    return dataclasses.replace(cfg, model=model, compute_dtype=dtype)


@dataclasses.dataclass
class Built(execute.Built):
    """A run's parts; the teacher's states may come from an earlier run's cache."""

    teacher_cache: CachedTeacher | None

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Training batches on the devices, by step."""
        batches = self.train_data.iterate(start, stop)
        if self.teacher_cache is not None and self.phases[active(self.phases, start)].frozen:
            batches = self.teacher_cache.extend(batches)
        for step, batch in batches:
            yield step, self.put(batch)


def build(cfg: PretrainConfig) -> Built:
    """Opens the data, the teacher and the mesh, and describes the state; trains nothing."""
    data.check(cfg.data)
    mesh = make_mesh(cfg.mesh)
    check_rows(cfg, mesh)
    check_hosts_rows(mesh, cfg.data.batch_size)
    part, parts = host_rows(mesh)
    hosts = {"process_index": part, "process_count": parts}
    train_data = data.build(cfg.data, split="train", **hosts)
    held_out = data.build(cfg.data, split="held_out", **hosts)
    init, shape, begin = open_init(cfg.init, cfg.model, train_data.tokenizer, cfg.run.dir)
    cfg = dataclasses.replace(cfg, init=init, model=shape)
    cfg = resolve(cfg, train_data.tokenizer.vocab_size)
    teacher = open_teacher(
        cfg.teacher, seq_len=cfg.data.seq_len, dtype=cfg.compute_dtype, mesh=mesh
    )
    if teacher is not None:
        check_tokenizer(teacher, train_data.tokenizer.fingerprint)
        # The saved config names the very checkpoint, also when the teacher trains on.
        cfg = dataclasses.replace(cfg, teacher=dataclasses.replace(cfg.teacher, step=teacher.step))
    specs = decoder.specs(cfg.model)
    program = describe(cfg, mesh, teacher, make_optimiser(cfg.optim, specs, cfg.train.steps))
    phases, teacher_cache = with_cache(
        program.phases,
        cfg.teacher.cache_dir,
        teacher.identity if teacher else "",
        f"{train_data.corpus_sha256} {train_data.plan_sha256} {train_data.tokenizer.fingerprint} "
        f"{cfg.data.batch_size} {cfg.compute_dtype}",
    )
    for phase in phases:
        phase.objective.check_batch(train_data.batch(0))
    create = make_create(program.specs, phases, cfg.run.seed)
    initialise = jax.jit(create, out_shardings=program.shardings, donate_argnums=0)
    return Built(
        **parts_of(dataclasses.replace(program, phases=phases)),
        train_data=train_data,
        held_out=held_out,
        init_state=lambda: initialise({"model": begin.load(mesh)} if begin else {}),
        files=begin.files if begin else {},
        facts={"init": init.path, "init_step": init.step} if init.path else {},
        teacher_cache=teacher_cache,
        fingerprint={
            "model": shape_of(cfg.model),
            "tokenizer": train_data.tokenizer.fingerprint,
        },
    )


def vocab_of(cfg: PretrainConfig) -> int:
    """The vocabulary's size, where the config or a tokenizer at hand tells it."""
    match cfg.data.tokenizer:
        case _ if cfg.model.vocab_size:
            return cfg.model.vocab_size
        case Bytes():
            return ByteTokenizer().vocab_size
        case HfJson(path=path) as named if _is_there(path):
            return load_hf_json(named).vocab_size
        case SentencePiece(model=model) if _is_there(model):
            return load_sentencepiece(model).vocab_size
        case SentencePiece(model="") as trained:
            return trained.train_vocab_size
    raise UserError(
        "the vocabulary's size is not known: model.vocab_size is 0 and the tokenizer is not at "
        "hand; set --config.model.vocab_size=N"
    )


def _is_there(path: str) -> bool:
    return bool(path) and epath.Path(path).expanduser().exists()


def program_for(cfg: PretrainConfig, devices: Sequence[Any]) -> Program:
    """The run's programs on devices that need not be here; reads no data.

    The teacher is the one of teacher.path where that is at hand, else it has teacher.shape. It runs
    in every step: what `teacher.cache_dir` would spare a later run is not looked at.
    """
    data.check(cfg.data)
    mesh = make_mesh(cfg.mesh, devices)
    check_rows(cfg, mesh)
    cfg = dataclasses.replace(cfg, model=init_shape(cfg.init, cfg.model))
    cfg = resolve(cfg, vocab_of(cfg), devices[0])
    known = {"seq_len": cfg.data.seq_len, "dtype": cfg.compute_dtype, "mesh": mesh}
    teacher, shape = None, cfg.teacher.shape
    if shape is None or cfg.teacher.factory or _is_there(cfg.teacher.path):
        teacher = open_teacher(cfg.teacher, **known)
    else:
        vocab_size = shape.vocab_size or cfg.model.vocab_size  # It reads the student's tokens.
        teacher = teacher_of_shape(dataclasses.replace(shape, vocab_size=vocab_size), **known)
    specs = decoder.specs(cfg.model)
    return describe(cfg, mesh, teacher, make_optimiser(cfg.optim, specs, cfg.train.steps))


def run(cfg: PretrainConfig, *, command: str = "") -> epath.Path:
    """Trains, or goes on where the run's folder stands; returns the report's path."""
    return execute.run(cfg, build, command=command)
