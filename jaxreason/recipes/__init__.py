"""Recipes compose the rooms into runs; each opens with its story in a few lines."""

from types import ModuleType


def recipes() -> dict[type, ModuleType]:
    """The recipes that train: the class of their config, and their module with `run(cfg, ...)` and
    `program_for(cfg, devices)`, which describes a run's steps to be compiled elsewhere.

    A module whose runs are not plain decoders also has `inspect_run(cfg, folder, meta)`, by which
    `open_model` opens one of its checkpoints. They are imported here, as they open models too.
    """
    from jaxreason.recipes import finetune, first, pretrain

    return {
        pretrain.PretrainConfig: pretrain,
        finetune.FinetuneConfig: finetune,
        first.SkippingConfig: first,
    }
