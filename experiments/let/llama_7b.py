"""LET at 7B: a LLaMA-style student, Llama-3.2-1B as its teacher.

    python -m jaxreason.main --config=experiments/let/llama_7b.py \
        --config.mesh.data=4 --config.mesh.fsdp=16 \
        --config.data.path='gs://my-bucket/pile/*.jsonl.zst' \
        --config.data.tokenizer.path=gs://my-bucket/llama3/tokenizer.json \
        --config.teacher.path=gs://my-bucket/llama-3.2-1b --config.run.dir=gs://my-bucket/runs/let7b

The student has Llama 2's 7B shape and reads its teacher's tokens (128,256 of them). The paper's 7B
run names the teacher and little else: batch, learning rate, sequence length, warm-up and weight
decay below are reconstructed. Meant for a v5p 4x4x4 slice (64 chips); nothing has been trained
here. What its steps need there, from the TPU compiler: docs/results/aot_gates.json, and

    python -m jaxreason.main --config=experiments/let/llama_7b.py \
        --config.mesh.data=4 --config.mesh.fsdp=16 --compile_for=tpu:v5p:4x4x4
"""

import dataclasses

from jaxreason.data import DataConfig, HfJson
from jaxreason.models.presets import PRESETS
from jaxreason.objectives.let import Let
from jaxreason.recipes.pretrain import PretrainConfig, RunConfig
from jaxreason.recipes.teacher import TeacherConfig
from jaxreason.train.checkpoint import CheckpointConfig
from jaxreason.train.loop import TrainConfig
from jaxreason.train.optim import OptimConfig

TOKENS = 20_000_000_000
SEQ_LEN, BATCH = 2048, 1024
TEACHER = PRESETS["llama3p2_1b"]


def get_config(arg: str = "") -> PretrainConfig:
    """The run; `arg` is not used."""
    return PretrainConfig(
        run=RunConfig(title="LET 7B"),
        model=dataclasses.replace(
            PRESETS["llama2_7b"], vocab_size=TEACHER.vocab_size, remat="full"
        ),
        data=DataConfig(
            tokenizer=HfJson(path=""),
            seq_len=SEQ_LEN,
            batch_size=BATCH,
            held_out_fraction=0.001,
            held_out_batches=16,
        ),
        method=Let(lambda_0=0.1),
        teacher=TeacherConfig(shape=TEACHER),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=1000),
        train=TrainConfig(steps=TOKENS // (SEQ_LEN * BATCH), log_every=20, eval_every=1000),
        checkpoint=CheckpointConfig(every_steps=1000, keep_last=3),
        z_loss=1e-4,
    )
