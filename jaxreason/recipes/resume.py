"""What a run's folder may hold when a run starts in it."""

import json
import os
from typing import Any

from etils import epath

from jaxreason import config as config_lib
from jaxreason.core.errors import UserError

# Fields that change neither the numbers nor what a step means: where things run, how often they
# are looked at and kept. Everything else must be as it was.
FREE = (
    "run.dir",
    "run.title",
    "run.expected",
    "run.allow_changes",
    "train.log_every",
    "train.eval_every",
    "train.eval_at_start",
    "train.max_bad_steps",
    "train.profile_at",
    "train.profile_steps",
    "train.accumulate",
    "checkpoint",
    "mesh",
    "data.prefetch",
    "data.cache_dir",
    "teacher.cache_dir",
    "data.path",
    "data.held_out_batches",
    "teacher.path",
    "model.kernels",
    "model.attention",
    "model.layers",
    "model.remat",
    "model.moe.form",
    "run.samples",
    "logit_chunk",
    "base.name",
)
# A base that stays frozen is known by its weights' hash, wherever it lies.
FREE_BASE = ("init.path", "init.step")


def saved_config(run: epath.Path, kind: type) -> Any:
    """The config in a run's folder, whether it has a checkpoint yet or not; None where it is new.

    Raises:
      UserError: it is a run of another recipe.
    """
    config = run / "config.json"
    if not config.exists():
        return None
    try:
        found = json.loads(config.read_text()).get("_type")
    except (ValueError, AttributeError):  # Told of where it is read.
        found = kind.__name__
    if found != kind.__name__:
        what = "a config.json that is not a run's" if found is None else f"the run of a {found}"
        raise UserError(
            f"{run} holds {what}, this config is a {kind.__name__}; choose another run.dir"
        )
    return config_lib.load(config.read_text(), [kind], where=str(config))


def check_folder(directory: epath.Path) -> None:
    """Raises UserError, before any work, where a local folder could not be written."""
    if "://" in str(directory):
        return
    there = next((path for path in (directory, *directory.parents) if path.exists()), directory)
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "not writable" if there.is_dir() else "a file"
        raise UserError(
            f"run.dir is {directory}, but {there} is {what}; choose another folder for the run"
        )


def changes(directory: epath.Path, cfg) -> list[tuple[str, object, object]]:
    """The fields (path, saved, now) in which a folder's config differs where it must not."""
    saved = saved_config(directory, type(cfg))
    if saved is None:
        return []
    found = config_lib.diff(saved, cfg)
    # data.path and teacher.path may be another name of the same: their content has been compared.
    moe = cfg.model.moe if hasattr(cfg, "model") else None
    # Where room is short, each device drops tokens of its own; the balance is a micro-batch's.
    bound = set() if moe is None else {"train.accumulate"}
    bound |= {"mesh"} if moe is not None and moe.capacity_factor else set()
    method = getattr(cfg, "method", None)
    if getattr(method, "rate_over", "") == "batch" and getattr(method, "rate_weight", 0):
        bound.add("train.accumulate")  # The mean that is held is a micro-batch's own.
    moved = FREE_BASE if getattr(cfg, "frozen_base", False) else ()
    free = tuple(f"config.{name}" for name in (*FREE, *moved) if name not in bound)
    return [
        change
        for change in found
        if not any(change[0] == name or change[0].startswith(f"{name}.") for name in free)
    ]


def check_config(directory: epath.Path, cfg) -> None:
    """Raises UserError where the folder holds a run of another config.

    A run that goes on with other settings would be neither of the two, and its config.json would
    say nothing about its first part.
    """
    differing = changes(directory, cfg)
    if not differing or cfg.run.allow_changes:
        return
    path, saved, now = differing[0]
    more = f" (and {len(differing) - 1} more fields)" if len(differing) > 1 else ""
    raise UserError(
        f"{directory} holds a run with {path.removeprefix('config.')} {saved!r}, this config has "
        f"{now!r}{more}; choose another run.dir, use that run's config.json, or set "
        "run.allow_changes=true"
    )
