"""Copies a run's `metrics.jsonl` to TensorBoard, Weights & Biases or trackio, after the fact.

Training itself knows none of them: they read the same file as the report.
"""

import importlib
import json
from typing import Any

from etils import epath

from jaxreason.core.errors import UserError, nearest
from jaxreason.train.log import read_metrics


def export(run_dir: epath.PathLike, to: str, *, project: str = "jaxreason") -> str:
    """Copies a run's metrics to another viewer; tags are `<kind>/<name>`, such as `eval/loss`.

    Args:
      run_dir: the run's folder.
      to: `tensorboard` (event files in `<run_dir>/tensorboard`, replaced by each export), `wandb`
        or `trackio` (one new run named like the folder).
      project: the project's name there (wandb, trackio).

    Returns:
      One line that says where the numbers are now.

    Raises:
      UserError: an unknown `to`, a folder without metrics, or the package is not installed.
    """
    if to not in _WRITERS:
        raise UserError(f"--to={to}: expected one of {', '.join(_WRITERS)}{nearest(to, _WRITERS)}")
    run_dir = epath.Path(run_dir)
    rows = read_metrics(run_dir)
    if not rows:
        raise UserError(f"{run_dir}: no rows in metrics.jsonl; expected the folder of a run")
    return _WRITERS[to](run_dir, rows, project)


def _tensorboard(run_dir: epath.Path, rows: list[dict[str, Any]], project: str) -> str:
    del project  # TensorBoard has none.
    if "://" in str(run_dir):
        raise UserError(
            f"{run_dir}: TensorBoard files need a local folder; copy the run here first"
        )
    module = _load("tensorboardX", "tensorboard")
    folder = run_dir / "tensorboard"
    unfinished = run_dir / ".tensorboard.tmp"
    for old in (unfinished, folder):
        if old.exists():
            old.rmtree()
    writer = module.SummaryWriter(str(unfinished))
    for row in rows:
        when = row.get("time_unix")
        for tag, value in _tagged(row).items():
            if isinstance(value, str):
                writer.add_text(tag, value, row["step"], when)
            else:
                writer.add_scalar(tag, value, row["step"], when)
    writer.close()
    unfinished.replace(folder)
    return f"wrote {len(rows)} rows; show them with: tensorboard --logdir={folder}"


def _tracker(package: str):
    """Returns the writer for wandb, or for trackio, which offers the same three functions."""

    def write(run_dir: epath.Path, rows: list[dict[str, Any]], project: str) -> str:
        module = _load(package, package)
        path = run_dir / "config.json"
        config = json.loads(path.read_text()) if path.exists() else {}
        by_step: dict[int, dict[str, Any]] = {}  # Both want each step once, and rising.
        for row in rows:
            by_step.setdefault(row["step"], {}).update(_tagged(row))
        module.init(project=project, name=run_dir.name, config=config)
        for step in sorted(by_step):
            module.log(by_step[step], step=step)
        module.finish()
        return f"wrote {len(rows)} rows to {package}: project {project}, run {run_dir.name}"

    return write


def _tagged(row: dict[str, Any]) -> dict[str, Any]:
    skip = ("step", "kind", "time_unix")
    return {f"{row['kind']}/{name}": value for name, value in row.items() if name not in skip}


def _load(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"--to={name} needs the package {module}: pip install 'jaxreason[track]' "
            f"(or only: pip install {module})"
        ) from None


_WRITERS = {"tensorboard": _tensorboard, "wandb": _tracker("wandb"), "trackio": _tracker("trackio")}
