"""Training that starts from a model's weights: converted, trained here, or Hugging Face's."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from jaxreason import config as config_lib
from jaxreason.core.errors import UserError
from jaxreason.core.text import HfTokenizer, Tokenizer
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.hf_config import FREE, plain
from jaxreason.recipes import open_model
from jaxreason.train import manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where the first weights come from; read at step 0 only, a run that goes on has its own."""

    path: str = ""
    """A run's folder, a checkpoint (trained here or converted), a Hugging Face folder or a .gguf
    file; empty draws random weights. Its shape is taken where `model` is left at its defaults."""
    step: int | None = None
    """Which checkpoint of a run; None takes the newest."""


@dataclasses.dataclass(frozen=True)
class Start:
    """The model to start from: what loads it on a mesh, and the files that travel along."""

    load: Callable[[Any], Any]
    files: Mapping[str, bytes]


def open_init(
    cfg: InitConfig, model: ModelConfig, tokenizer: Tokenizer, run: str
) -> tuple[InitConfig, ModelConfig, Start | None]:
    """The init that names the very checkpoint, the shape to train, and the start, if any.

    Raises:
      UserError: the model cannot be opened, has another shape than `model`, or another tokenizer.
    """
    if not cfg.path:
        return cfg, model, None
    if run and (saved := begun(run)) is not None:
        shape = merge_shape(model, saved.model, f"the run in {run}")
        same = saved.init.path == cfg.path and cfg.step is None
        return saved.init if same else cfg, shape, None
    opened, load = open_model.inspect(cfg.path, step=cfg.step)
    open_model.check_whole(opened, cfg.path, "training from it")
    shape = merge_shape(model, opened.config, cfg.path)
    known = open_model.fingerprints(opened.tokenizer)
    if known and tokenizer.fingerprint not in known and not _same(opened.tokenizer, tokenizer):
        raise UserError(
            f"the tokenizer of {cfg.path}, {known[0][:12]}, is not that of the data, "
            f"{tokenizer.fingerprint[:12]}; set data.tokenizer to the model's own tokenizer"
        )
    step = opened.source.get("step")
    named = manifest.is_complete(manifest.absolute(cfg.path)) or step is None
    start = Start(lambda mesh: load("float32", mesh), opened.files)
    return dataclasses.replace(cfg, step=cfg.step if named else step), shape, start


def init_shape(cfg: InitConfig, model: ModelConfig) -> ModelConfig:
    """The shape to train, where it follows from the model that training starts from."""
    if not cfg.path:
        return model
    opened, _ = open_model.inspect(cfg.path, step=cfg.step)
    return merge_shape(model, opened.config, cfg.path)


def begun(run: str, root: type | None = None) -> Any:
    """The saved config of a run's folder that holds a checkpoint; None where it holds none.

    `root` is the class that it must have; None: that of pretraining.
    """
    from jaxreason.recipes.pretrain import PretrainConfig  # It has an InitConfig.

    directory = epath.Path(run).expanduser()
    checkpoints, config = directory / "checkpoints", directory / "config.json"
    folders = (manifest.step_folder(checkpoints, step) for step in manifest.steps(checkpoints))
    if not config.exists() or not any(map(manifest.is_complete, folders)):
        return None
    return config_lib.load(config.read_text(), [root or PretrainConfig], where=str(config))


def merge_shape(wanted: ModelConfig, source: ModelConfig, where: str) -> ModelConfig:
    """The source's shape in the forms that are wanted; UserError where another shape is wanted."""
    forms = {name: getattr(wanted, name) for name in FREE}
    shape = dataclasses.replace(source, **forms)
    if wanted == dataclasses.replace(ModelConfig(), **forms):
        return shape
    if not wanted.vocab_size:
        wanted = dataclasses.replace(wanted, vocab_size=source.vocab_size)
    ours, theirs = plain(wanted), plain(source)
    if name := next((name for name in ours if ours[name] != theirs[name]), None):
        raise UserError(
            f"model.{name} is {ours[name]!r}, {where} has {theirs[name]!r}; leave `model` at its "
            "defaults to take the shape of the model that training starts from"
        )
    return dataclasses.replace(shape, moe=wanted.moe)  # With its losses, form and capacity.


def _same(ours: Tokenizer | None, theirs: Tokenizer) -> bool:
    """Whether two tokenizers differ only in which of their tokens ends or opens a document."""
    if isinstance(ours, HfTokenizer) and isinstance(theirs, HfTokenizer):
        return ours.same_ids(theirs)
    return False
