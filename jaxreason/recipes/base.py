"""The model that fine-tuning starts from: found, identified, described beside the run.

Under adapters the base is read whenever a run begins or goes on and is in none of its checkpoints;
so the run keeps a hash of the base's weights, and goes on with no other.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from etils import epath

from jaxreason.core.errors import UserError
from jaxreason.core.text import Tokenizer, TokenizerConfig
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.hf_config import FREE
from jaxreason.models.hf_text import template_of
from jaxreason.models.model import Model
from jaxreason.recipes import open_model
from jaxreason.recipes.encode_examples import DATE
from jaxreason.recipes.init import InitConfig, begun, merge_shape
from jaxreason.recipes.resume import saved_config
from jaxreason.train import load, manifest

_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseModel:
    """What the model is that a run starts from; filled in when the run begins."""

    sha256: str = ""
    """Hash of its weights' files (see `recipes.base.identity`); a run goes on with no other."""
    tokenizer: TokenizerConfig | None = None
    """Its tokenizer, kept in the run's folder."""
    family: str | None = None
    """`model_type` of the Hugging Face config that it came from."""
    eos_ids: tuple[int, ...] = ()
    """Ids that end a completion."""
    bos_id: int | None = None
    """Id in front of a plain prompt."""
    context: int | None = None
    """Longest context, in tokens, that the source states."""
    name: str = ""
    """What it is called."""
    date: str = ""
    """The day, YYYY-MM-DD, that its chat template is told where it writes today's (Llama 3's do);
    that on which the run begins, and the same whenever it goes on. Empty: it writes none."""


@dataclasses.dataclass(frozen=True)
class Base:
    """An opened base: what a recipe needs of it before anything is loaded."""

    init: InitConfig
    """Names the very checkpoint."""
    shape: ModelConfig
    """Its shape in the forms that are wanted."""
    card: BaseModel
    model: Model
    """Its tokenizer, template and end tokens; without parameters."""
    load: open_model.Load | None
    """What loads its parameters; None where a run goes on that has all parameters of its own."""
    facts: dict[str, Any]

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, which a base has."""
        assert self.model.tokenizer is not None
        return self.model.tokenizer

    def loader(self, mesh) -> Callable[[], Any]:
        """What puts its parameters on a mesh in float32, once: later calls give the same arrays."""

        def load():
            assert self.load is not None  # Asked for only where a run begins, or its base is read.
            return self.load("float32", mesh)

        return functools.cache(load)


def open_base(cfg: Any, *, frozen: bool) -> Base:
    """Opens the model of `cfg.init.path`; nothing of its weights is loaded yet.

    Args:
      cfg: a recipe's config with the parts run, init, model (forms, and a shape where one is
        demanded) and base (what a saved config says of it; it must be found again).
      frozen: whether the base is read whenever the run goes on. Otherwise a run that has begun has
        all parameters of its own, and its base may be gone.

    Raises:
      UserError: there is no such model, it has no tokenizer, or it is another than the run's.
    """
    init, run = cfg.init, epath.Path(cfg.run.dir).expanduser()
    if not init.path:
        raise UserError(
            "init.path is empty; set --config.init.path to the model to fine-tune: a Hugging Face "
            "folder, a .gguf file, a run or a checkpoint"
        )
    before = saved_config(run, type(cfg)) if cfg.run.dir else None
    saved = begun(cfg.run.dir, type(cfg)) if before is not None else None
    if saved is not None and saved.init.path == init.path and init.step is None:
        init = saved.init
    if saved is not None and not frozen:
        shape = merge_shape(cfg.model, saved.model, f"the run in {run}")
        kept = kept_model(saved, run)
        return Base(init, shape, saved.base, kept, None, _facts(init, saved.base))
    opened, load_params = open_model.inspect(init.path, step=init.step)
    open_model.check_whole(opened, init.path, "training from it")
    if opened.tokenizer is None:
        raise UserError(f"{init.path} has no tokenizer; fine-tuning needs a model that has one")
    step = opened.source.get("step")
    if step is not None and not manifest.is_complete(manifest.absolute(init.path)):
        init = dataclasses.replace(init, step=step)
    card = BaseModel(
        sha256=identity(init.path, init.step),
        tokenizer=open_model.stored_settings(opened),
        family=opened.family,
        eos_ids=opened.eos_ids,
        bos_id=opened.bos_id,
        context=opened.context,
        name=opened.name,
        date=_date(opened.chat_template, cfg.base, before.base if before is not None else None),
    )
    for known in (cfg.base, saved.base if saved is not None else cfg.base):
        if known.sha256 and known.sha256 != card.sha256:
            raise UserError(
                f"{init.path} is another model than the run's base: its weights' hash is "
                f"{card.sha256[:12]}, the run's {known.sha256[:12]}; give the base that the run "
                "began with, or begin another run"
            )
    shape = merge_shape(cfg.model, opened.config, init.path)
    return Base(init, shape, card, opened, load_params, _facts(init, card))


def shape_at_hand(init: InitConfig, model: ModelConfig) -> ModelConfig:
    """The shape of a base whose weights are not asked for: that of the model at init.path where it
    is at hand, else the config's own.

    Raises:
      UserError: neither is there, or the model does not open or has another shape than `model`.
    """
    if init.path and epath.Path(init.path).expanduser().exists():
        opened, _ = open_model.inspect(init.path, step=init.step)
        open_model.check_whole(opened, init.path, "training from it")
        return merge_shape(model, opened.config, init.path)
    forms = {name: getattr(model, name) for name in (*FREE, "vocab_size")}
    # Beside a vocabulary, a shape of defaults alone is one that nobody asked for.
    if model.vocab_size and model != dataclasses.replace(ModelConfig(), **forms):
        return model
    what = f"there is no model at init.path={init.path}" if init.path else "init.path is empty"
    raise UserError(
        f"{what}, so the base's shape is not known; set --config.init.path to a model, or its "
        "shape: --config.model.vocab_size, d_model, num_layers, num_heads, num_kv_heads and d_ff"
    )


def _facts(init: InitConfig, card: BaseModel) -> dict[str, Any]:
    return {"base": init.path, "base_step": init.step, "base_sha256": card.sha256}


def _date(template: str | None, wanted: BaseModel, saved: BaseModel | None) -> str:
    """The day that a template is told: the config's, else the run's own, else today; or none."""
    if "strftime_now" not in (template or ""):
        return ""
    if wanted.date or saved is None:
        return wanted.date or _today()
    return saved.date


def _today() -> str:
    return datetime.date.today().isoformat()


def notes(cfg: Any) -> list[str]:
    """Lines to show when a run begins: the day that its template is told, if it writes one."""
    if not cfg.base.date:
        return []
    return [
        f"the chat template writes the day: this run's examples are of {cfg.base.date} "
        "(base.date), generation writes the day on which it is asked"
    ]


def kept_model(saved: Any, run: epath.Path) -> Model:
    """The model of a fine-tuned run, without parameters, from the run's own folder.

    Raises:
      UserError: a file of the tokenizer is gone or damaged.
    """
    files = open_model.travelling(run / "tokenizer")
    card: BaseModel = saved.base
    return Model(
        params=None,
        config=saved.model,
        tokenizer=open_model.stored_tokenizer(card.tokenizer, run),
        chat_template=template_of(files, str(run)),
        eos_ids=card.eos_ids,
        bos_id=card.bos_id,
        name=run.name,
        family=card.family,
        context=card.context,
        files=files,
        source={DATE: card.date} if card.date else {},
    )


def identity(path: str | os.PathLike, step: int | None = None) -> str:
    """SHA-256, in hex, of a model's weights: of the manifest of a checkpoint of ours, which holds
    every file's hash; else of the weights files, read whole.

    So it does not depend on where the model lies. That takes seconds a gigabyte; blocks alone
    would not find an edit of a few layers.
    """
    text = os.fspath(path)
    root = manifest.absolute(text)
    if not text.endswith(".gguf") and open_model.is_ours(root):
        files = manifest.read(load.find(root, step))["files"]
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    folder = epath.Path(os.path.expanduser(text))
    files = [folder] if text.endswith(".gguf") else sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{stream.seek(0, os.SEEK_END)} ".encode())
            stream.seek(0)
            while block := stream.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
