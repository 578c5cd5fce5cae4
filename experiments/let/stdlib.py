"""LET on the Python standard library's own source, bytes as tokens: the runs behind docs/papers.md.

A student of 10.6M parameters (without embeddings) learns from 2.6M bytes; its teacher has 1.8M,
six times fewer, and has seen 20M bytes of the same training split.

    python -m jaxreason.main --config=experiments/let/stdlib.py:teacher
    python -m jaxreason.main --config=experiments/let/stdlib.py:let,seed=1

Arms: teacher, baseline, let, distill, salt, l2l. The whole table: `python -m benchmarks.let_table`.
Hardware: 2 CPU cores with AMX, 5 minutes a run and 15 for the teacher. Numbers: docs/papers.md.
"""

import dataclasses

from jaxreason.core.errors import UserError, nearest
from jaxreason.data import DataConfig
from jaxreason.models.decoder import ModelConfig
from jaxreason.objectives.distill import Distill, Salt
from jaxreason.objectives.let import Let
from jaxreason.objectives.lm import NextToken
from jaxreason.recipes.pretrain import PretrainConfig, RunConfig
from jaxreason.recipes.teacher import TeacherConfig
from jaxreason.train.checkpoint import CheckpointConfig
from jaxreason.train.loop import TrainConfig
from jaxreason.train.optim import OptimConfig

TEACHER_DIR = "runs/let/teacher"
STUDENT = ModelConfig(d_model=384, num_layers=6, num_heads=6, d_ff=1024)
TEACHER = ModelConfig(d_model=192, num_layers=4, num_heads=4, d_ff=512)
METHODS = {
    "baseline": NextToken(),
    "let": Let(lambda_0=0.3),
    "distill": Distill(weight=0.5),
    "salt": Salt(weight=0.5),
    "l2l": Let(lambda_0=0.3, pairing="L2L"),
}


def get_config(arg: str = "baseline") -> PretrainConfig:
    """The run of an arm; `arg` is `ARM[,seed=N]`."""
    arm, _, rest = (arg or "baseline").partition(",")
    seed = int(rest.removeprefix("seed=") or 0)
    known = ["teacher", *METHODS]
    if arm not in known:
        raise UserError(f"arm {arm!r}; expected one of {', '.join(known)}{nearest(arm, known)}")
    data = DataConfig(seq_len=256, batch_size=16, seed=seed, held_out_batches=32)
    student = PretrainConfig(
        run=RunConfig(dir=f"runs/let/{arm}-seed{seed}", seed=seed, title=f"{arm}, seed {seed}"),
        model=STUDENT,
        data=data,
        method=METHODS.get(arm, NextToken()),
        teacher=TeacherConfig(path="" if arm == "baseline" else TEACHER_DIR),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=40),
        train=TrainConfig(steps=640, log_every=10, eval_every=128),
        checkpoint=CheckpointConfig(every_steps=128, keep_last=1, keep_best=0),
    )
    if arm != "teacher":
        return student
    return dataclasses.replace(
        student,
        run=RunConfig(dir=TEACHER_DIR, seed=1000 + seed, title="teacher"),
        model=TEACHER,
        data=dataclasses.replace(data, batch_size=32, seed=1000 + seed),
        teacher=TeacherConfig(),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=100),
        train=TrainConfig(steps=2500, log_every=20, eval_every=500),
        checkpoint=CheckpointConfig(every_steps=500, keep_last=5),
    )
