"""The demo: LET on this machine's own Python source, in minutes.

A small teacher learns first. Then two students that start from the same weights and read the same
batches: one alone, one that the teacher's last layer guides during the first half of its steps.
"""

import dataclasses
import shutil

from etils import epath
from rich.console import Console
from rich.table import Table

from jaxreason.core.errors import UserError
from jaxreason.data import DataConfig
from jaxreason.models.decoder import ModelConfig
from jaxreason.objectives.let import Let
from jaxreason.objectives.lm import NextToken
from jaxreason.recipes import pretrain
from jaxreason.recipes.pretrain import PretrainConfig, RunConfig
from jaxreason.recipes.teacher import TeacherConfig
from jaxreason.train.checkpoint import CheckpointConfig
from jaxreason.train.loop import TrainConfig
from jaxreason.train.optim import OptimConfig
from jaxreason.train.progress import duration, quantity
from jaxreason.train.report import Table as ReportTable
from jaxreason.train.report import write_report
from jaxreason.train.runs import (
    RunData,
    difference_at_equal_steps,
    load_run,
    speedup,
)

EXPECTED = "LET below the baseline at equal steps (paper: 1.6 times fewer steps at 1.4B)"
NAMES = ("teacher", "baseline", "let")


def configs(folder: epath.Path) -> dict[str, PretrainConfig]:
    """The demo's three runs, in their order."""
    teacher = PretrainConfig(
        run=RunConfig(dir=str(folder / "teacher"), seed=1, title="teacher"),
        model=ModelConfig(d_model=128, num_layers=4, num_heads=4, d_ff=352),
        data=DataConfig(seq_len=256, batch_size=32, seed=1, held_out_batches=8),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=50),
        train=TrainConfig(steps=900, log_every=10, eval_every=300),
        checkpoint=CheckpointConfig(every_steps=300, keep_last=1),
    )
    student = PretrainConfig(
        run=RunConfig(dir=str(folder / "baseline"), title="baseline"),
        model=ModelConfig(d_model=256, num_layers=6, num_heads=4, d_ff=704),
        data=DataConfig(seq_len=256, batch_size=16, held_out_batches=16),
        method=NextToken(),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=30),
        train=TrainConfig(steps=320, log_every=5, eval_every=40),
        checkpoint=CheckpointConfig(every_steps=160, keep_last=1),
    )
    let = dataclasses.replace(
        student,
        run=RunConfig(dir=str(folder / "let"), title="LET student"),
        method=Let(lambda_0=0.3),
        teacher=TeacherConfig(path=str(folder / "teacher")),
    )
    return dict(zip(NAMES, (teacher, student, let), strict=True))


def choose_folder(wanted: str) -> epath.Path:
    """The folder to work in: an interrupted demo goes on, a finished one stays as it is."""
    folder, number = epath.Path(wanted), 1
    while (folder / "report.html").exists():
        number += 1
        folder = epath.Path(f"{wanted}-{number}")
    return folder


def run(wanted: str) -> epath.Path:
    """Trains what is not trained yet, prints the table, writes the report; returns its path."""
    folder, console = choose_folder(wanted), Console(highlight=False)
    if "://" not in str(folder):
        parent = next(p for p in [folder, *folder.parents] if p.exists())
        free = shutil.disk_usage(parent).free / 1e9
        if free < 1:
            raise UserError(
                f"{parent} has {free:.1f} GB free, the demo needs 1; name another folder"
            )
    for i, (name, cfg) in enumerate(configs(folder).items(), 1):
        console.print(f"[bold]{i}/3 {name}[/]: {cfg.train.steps} steps")
        pretrain.run(cfg, command="make demo")
    runs = {name: load_run(folder / name, name) for name in NAMES}
    console.print(result(runs))
    report = write_report(
        folder / "report.html",
        title="Late-to-early training on the Python standard library",
        runs=[runs["baseline"], runs["let"]],
        baseline="baseline",
        summary=[teacher_table(runs["teacher"])],
        command="make demo",
        expected=EXPECTED,
        about=about(runs),
    )
    console.print(f"report: {report}")
    return report


def about(runs: dict[str, RunData]) -> str:
    """One sentence on what was trained."""
    student, teacher = runs["let"].facts, runs["teacher"].facts
    millions = lambda facts: f"{facts['params_non_embedding'] / 1e6:.1f}M"  # noqa: E731
    return (
        f"Two students of {millions(student)} parameters read the same bytes of Python's own "
        f"source; one of them is guided by the last layer of a teacher of {millions(teacher)} "
        "parameters during the first half of its steps."
    )


def teacher_table(teacher: RunData) -> ReportTable:
    """What the teacher is and what it cost; its batches are twice the students'."""
    seconds = teacher.wall_time_s
    return ReportTable(
        title="The teacher",
        columns=("Parameters", "Tokens read", "Held-out loss", "Wall time"),
        rows=[
            (
                quantity(teacher.facts["params_non_embedding"]),
                quantity(teacher.tokens or 0),
                f"{teacher.held_out[-1][1]:.4f}",
                "n/a" if seconds is None else duration(seconds),
            )
        ],
        note="Trained first, on the same text; its cost is not in the students'.",
    )


def result(runs: dict[str, RunData]) -> Table:
    """The closing table: held-out loss, difference at equal steps, speed-up, wall time."""
    table = Table(title="held-out text")
    for column in ("run", "loss", "bits/byte", "difference", "speed-up", "wall time"):
        table.add_column(column, justify="left" if column == "run" else "right")
    base = runs["baseline"].held_out
    for name in ("baseline", "let", "teacher"):
        data, curve = runs[name], runs[name].held_out
        gap = speed = ""
        if name == "let":
            difference = difference_at_equal_steps(base, curve)
            ratio = speedup(base, curve)
            gap = f"{difference[1]:+.4f}" if difference else "n/a"
            speed = f"{ratio:.2f}x" if ratio else "n/a"
        bits = data.last("eval", "bits_per_byte")
        seconds = data.wall_time_s
        table.add_row(
            name,
            f"{curve[-1][1]:.4f}",
            "n/a" if bits is None else f"{bits:.4f}",
            gap,
            speed,
            "n/a" if seconds is None else duration(seconds),
        )
    return table
