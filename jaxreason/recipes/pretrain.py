"""Pretraining: text -> packed batches -> a decoder -> checkpoints and a report.

A method (LET, distillation, SALT) adds a phase with a frozen teacher in front of plain next-token
prediction. The run's folder is all there is: killed and started again, the same command goes on
where the newest sound checkpoint stands.
"""

import contextlib
import dataclasses
import functools
import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

import jaxreason
from jaxreason import config as config_lib
from jaxreason import data
from jaxreason.core import flops
from jaxreason.core.errors import Preempted, UserError
from jaxreason.core.mesh import (
    MeshConfig,
    batch_sharding,
    check_hosts_rows,
    host_rows,
    make_mesh,
    use_mesh,
)
from jaxreason.core.precision import resolve_dtype
from jaxreason.data import DataConfig
from jaxreason.eval.perplexity import make_eval_step, perplexity
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.model_config import shape_of
from jaxreason.objectives.lm import NextToken
from jaxreason.recipes import facts as facts_lib
from jaxreason.recipes.init import InitConfig, Start, open_init
from jaxreason.recipes.methods import Method
from jaxreason.recipes.open_model import keep_tokenizer
from jaxreason.recipes.program import Program, check_rows, describe, make_create
from jaxreason.recipes.resume import check_config, check_folder
from jaxreason.recipes.samples import write_samples
from jaxreason.recipes.teacher import TeacherConfig, check_tokenizer, open_teacher
from jaxreason.recipes.teacher_cache import CachedTeacher, with_cache
from jaxreason.train import state as state_lib
from jaxreason.train.checkpoint import CheckpointConfig, Checkpointer
from jaxreason.train.clock import Clock
from jaxreason.train.log import MetricsLog
from jaxreason.train.loop import Run, TrainConfig, train
from jaxreason.train.optim import OptimConfig, make_optimiser, make_schedule
from jaxreason.train.phase import active
from jaxreason.train.preempt import Preemption
from jaxreason.train.progress import Progress
from jaxreason.train.report import report_for_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run itself."""

    dir: str = ""
    """Folder of the run, local or in a bucket; it is resumed when it holds a checkpoint."""
    seed: int = 0
    """Seed of initial values and of everything random in training (data has its own)."""
    title: str = ""
    """Heading of the report."""
    expected: str = ""
    """The number to expect and where it is from, shown in the report."""
    samples: int = 0
    """Held-out texts that the report shows with the model's greedy continuation (one device only);
    each run then compiles generation too."""
    allow_changes: bool = False
    """Go on in a folder whose config differs; the run is then neither of the two."""


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
class Built(Program):
    """A run's parts, ready for the loop."""

    train_data: data.Dataset
    held_out: data.Dataset
    init_state: Any
    begin: Start | None
    teacher_cache: CachedTeacher | None
    fingerprint: dict[str, Any]

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This host's rows, as part of the global batch on the devices."""
        sharding = batch_sharding(self.mesh)
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Training batches on the devices, by step."""
        batches = self.train_data.iterate(start, stop)
        if self.teacher_cache is not None and self.phases[active(self.phases, start)].frozen:
            batches = self.teacher_cache.extend(batches)
        for step, batch in batches:
            yield step, self.put(batch)

    @functools.cached_property
    def _eval_step(self):
        return jax.jit(make_eval_step(self.forward, self.cfg.logit_chunk))

    def evaluate(self, state: state_lib.TrainState) -> dict[str, float]:
        """Held-out loss of a state."""
        batches = (self.put(batch) for _, batch in self.held_out.iterate())
        return perplexity(self._eval_step, state.params, batches, self.held_out.bytes_per_token)


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
    create = make_create(specs, phases, cfg.run.seed)
    initialise = jax.jit(create, out_shardings=program.shardings, donate_argnums=0)
    names = [field.name for field in dataclasses.fields(program)]
    described: dict[str, Any] = {name: getattr(program, name) for name in names}
    described["phases"] = phases
    return Built(
        **described,
        train_data=train_data,
        held_out=held_out,
        init_state=lambda: initialise(begin.load(mesh) if begin else None),
        begin=begin,
        teacher_cache=teacher_cache,
        fingerprint={
            "model": shape_of(cfg.model),
            "tokenizer": train_data.tokenizer.fingerprint,
        },
    )


def never_best(cfg: PretrainConfig) -> bool:
    """Whether no periodic save is also evaluated, so that `keep_best` has nothing to compare."""
    saves, evaluations = cfg.checkpoint.every_steps, cfg.train.eval_every
    if not cfg.checkpoint.keep_best or not saves or saves > cfg.train.steps:
        return False
    return not evaluations or math.lcm(saves, evaluations) > cfg.train.steps


def run(cfg: PretrainConfig, *, command: str = "") -> epath.Path:
    """Trains, or goes on where the run's folder stands; returns the report's path."""
    clock = Clock()
    if not cfg.run.dir:
        raise UserError("run.dir is not set; name the run's folder with --config.run.dir=...")
    directory = epath.Path(cfg.run.dir).expanduser()
    check_folder(directory)
    built = build(cfg)
    cfg = built.cfg
    config_json = config_lib.dump(cfg)
    facts = facts_lib.collect(built, command or shlex.join([sys.executable, *sys.argv]))
    if cfg.init.path:
        facts |= {"init": cfg.init.path, "init_step": cfg.init.step}
    facts_lib.check_same_run(directory, facts)
    facts_lib.check_same_on_hosts(facts)
    check_config(directory, cfg)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir {directory} cannot be made ({error.strerror}); choose another folder"
        ) from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_mesh(built.mesh))
        preemption = stack.enter_context(Preemption(cfg.checkpoint.on_preemption))
        checkpointer = stack.enter_context(
            Checkpointer(
                directory / "checkpoints",
                cfg.checkpoint,
                config_json=config_json,
                model_fingerprint=built.fingerprint,
                version=jaxreason.__version__,
            )
        )
        with clock.charge("load"):
            restored = checkpointer.latest(built.abstract_state)
            state = built.init_state() if restored is None else restored.state
        start = 0 if restored is None else restored.step
        if start > cfg.train.steps:
            raise UserError(
                f"{directory} holds a run of {start} steps, train.steps is {cfg.train.steps}; "
                "choose another run.dir"
            )
        log = stack.enter_context(MetricsLog(directory))
        log.truncate_after(start if restored else -1)
        if jax.process_index() == 0:
            config_lib.save(cfg, directory / "config.json")
            facts_lib.save(facts, directory)
            files = built.begin.files if built.begin else {}
            keep_tokenizer(built.train_data.tokenizer, directory / "tokenizer", files)
        progress = stack.enter_context(
            Progress(cfg.train.steps, cfg.run.title or directory.name, start=start)
        )
        for line in restored.skipped if restored else ():
            progress.note(f"passed over a damaged checkpoint: {line}")
        if restored:
            progress.note(f"goes on after step {start}")
        if start == 0 and never_best(cfg):
            progress.note("checkpoint.keep_best keeps nothing: no save falls on an evaluation")
        peak = flops.peak_flops()
        state = train(
            Run(
                cfg=cfg.train,
                phases=built.phases,
                step_fn=built.step_fn,
                batches=built.batches,
                evaluate=built.evaluate,
                checkpointer=checkpointer,
                log=log,
                progress=progress,
                preemption=preemption,
                tokens_per_step=cfg.data.batch_size * cfg.data.seq_len,
                flops=built.flops,
                learning_rate=make_schedule(cfg.optim, cfg.train.steps),
                peak_flops=peak * built.mesh.size if peak else None,
                clock=clock,
            ),
            state,
            start,
        )
    done = int(state.step)
    if done < cfg.train.steps:
        raise Preempted(done)
    if cfg.run.samples and built.mesh.size == 1:
        write_samples(
            directory, state.params["model"], cfg.model, built.held_out,
            dtype=cfg.compute_dtype, count=cfg.run.samples,
        )  # fmt: skip
    return report_for_run(directory) if jax.process_index() == 0 else directory
