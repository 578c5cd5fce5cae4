"""LET at the paper's scale: a 1.4B LLaMA-style student, a small pretrained teacher.

    python -m jaxreason.main --config=experiments/let/llama_1p4b.py \
        --config.data.path='gs://my-bucket/pile/*.jsonl.zst' \
        --config.data.tokenizer.path=gs://my-bucket/smollm/tokenizer.json \
        --config.teacher.path=gs://my-bucket/runs/teacher --config.run.dir=gs://my-bucket/runs/let

The student is trained with the teacher's tokenizer. The paper used
SmolLM-135M as teacher, 20B tokens of The Pile and 32 A100-80GB, and reports 1.6 times fewer steps.
Its batch, learning rate, sequence length, warm-up and weight decay are not known: those below are
reconstructed. This run has not been made here; its steps are compiled
for TPU and GPU slices (docs/results/aot_gates.json).
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
SEQ_LEN, BATCH = 2048, 512


def get_config(arg: str = "") -> PretrainConfig:
    """The run; `arg` is not used."""
    steps = TOKENS // (SEQ_LEN * BATCH)
    return PretrainConfig(
        run=RunConfig(title="LET 1.4B", expected="1.6 times fewer steps (paper, 1.4B)"),
        model=dataclasses.replace(PRESETS["llama_1p4b"], vocab_size=49152, remat="full"),
        data=DataConfig(
            tokenizer=HfJson(path=""),
            seq_len=SEQ_LEN,
            batch_size=BATCH,
            held_out_fraction=0.001,
            held_out_batches=16,
        ),
        method=Let(lambda_0=0.1),
        teacher=TeacherConfig(shape=PRESETS["smollm_135m"]),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=1000),
        train=TrainConfig(steps=steps, log_every=20, eval_every=1000),
        checkpoint=CheckpointConfig(every_steps=1000, keep_last=3),
        z_loss=1e-4,
    )
