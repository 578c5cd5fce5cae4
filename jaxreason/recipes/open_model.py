"""Opens a model, wherever it is from: our runs and checkpoints, Hugging Face, GGUF."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jaxreason import config as config_lib
from jaxreason.core.errors import UserError
from jaxreason.core.precision import resolve_dtype
from jaxreason.core.text import (
    Bytes,
    ByteTokenizer,
    HfJson,
    HfTokenizer,
    SentencePiece,
    Tokenizer,
    TokenizerConfig,
    load_hf_json,
    load_sentencepiece,
)
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.hf import Load, inspect_hf, shardings_of
from jaxreason.models.hf_text import TRAVEL, eos_of, template_of
from jaxreason.models.model import Model
from jaxreason.models.model_config import on_any_device
from jaxreason.models.own_text import files_of
from jaxreason.train import load, manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertedModel:
    """A model that came from elsewhere: the config.json of its checkpoint."""

    model: ModelConfig = ModelConfig()
    """Shape of the decoder."""
    tokenizer: TokenizerConfig | None = None
    """Its tokenizer; a path is relative to the checkpoint's folder."""
    family: str | None = None
    """`model_type` of the Hugging Face config that it came from."""
    eos_ids: tuple[int, ...] = ()
    """Ids that end a completion."""
    bos_id: int | None = None
    """Id in front of a plain prompt."""
    context: int | None = None
    """Longest context, in tokens, that the source states."""
    name: str = ""
    """What the source calls the model."""
    source: dict[str, str] = dataclasses.field(default_factory=dict)
    """Where it was converted from."""


def open_model(
    path: str | os.PathLike,
    *,
    dtype: str = "auto",
    param_dtype: str = "float32",
    step: int | None = None,
    mesh=None,
) -> Model:
    """Opens a model for use.

    Args:
      path: a run's folder, a checkpoint of ours (trained or converted), a Hugging Face folder, or
        a .gguf file.
      dtype: compute precision: auto, bfloat16 or float32.
      param_dtype: precision in which parameters are held, bfloat16 or float32.
      step: which checkpoint of a run; None is the newest.
      mesh: where the parameters live; None is the first device.

    Raises:
      UserError: nothing of these is there, or it is damaged or not supported.
    """
    model, load_params = inspect(path, step=step)
    dtype = resolve_dtype(dtype)
    return dataclasses.replace(model, params=load_params(param_dtype, mesh), dtype=dtype)


def check_whole(model: Model, path: str | os.PathLike, use: str) -> None:
    """Raises UserError for a model that chooses its layers by prompt where `use` runs all of them.

    Its adapters were trained for the layers that are left: with all of them it is another model.
    """
    if model.depth is not None:
        raise UserError(
            f"{path} chooses its layers by prompt, and {use} would run them all; use it with "
            "jaxreason.generate, or give a model without routers"
        )


def inspect(path: str | os.PathLike, *, step: int | None = None) -> tuple[Model, Load]:
    """A model without its parameters, and what loads them: (precision, mesh) -> parameters.

    Raises:
      UserError: as `open_model`.
    """
    text = os.fspath(path)
    root = manifest.absolute(text)
    if text.endswith(".gguf"):
        from jaxreason.models.gguf import inspect_gguf

        return inspect_gguf(text)
    if (root / "config.json").exists() and not is_ours(root):
        return inspect_hf(text)
    return _inspect_ours(root, step)


def is_ours(root: epath.Path) -> bool:
    """Whether a folder is a run, a folder of checkpoints, or one checkpoint of this program."""
    return (
        manifest.is_complete(root) or (root / "checkpoints").is_dir() or bool(manifest.steps(root))
    )


def _inspect_ours(root: epath.Path, step: int | None) -> tuple[Model, Load]:
    from jaxreason.recipes import recipes  # They open models too.

    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(
            f"{root} {what}; expected a run's folder, a checkpoint, a Hugging Face folder or a "
            ".gguf file"
        )
    folder = load.find(root, step)
    known = recipes()
    saved = config_lib.load(load.load_config(folder), [*known, ConvertedModel], where=str(folder))
    try:
        manifest.verify(folder, lambda path: not path.startswith(f"{manifest.ARRAYS}/"))
    except manifest.Damaged as error:
        raise UserError(f"{folder} is damaged: {error}; put back a good copy") from None
    meta = manifest.read_meta(folder)
    facts = {"source": str(root), "step": meta["step"], "format": "jaxreason"}
    cfg = on_any_device(saved.model)
    if hasattr(known.get(type(saved)), "inspect_run"):
        return known[type(saved)].inspect_run(saved, folder, meta)
    if isinstance(saved, ConvertedModel):
        tokenizer = stored_tokenizer(saved.tokenizer, folder)
        files = travelling(folder / "tokenizer")
        model = Model(
            params=None,
            config=cfg,
            tokenizer=tokenizer,
            chat_template=template_of(files, str(folder)),
            eos_ids=saved.eos_ids,
            bos_id=saved.bos_id,
            name=saved.name,
            family=saved.family,
            context=saved.context,
            files=files,
            source={**saved.source, **facts},
        )
    else:
        run = folder.parent.parent
        tokenizer = _run_tokenizer(saved.data.tokenizer, run)
        expected = meta["model_fingerprint"]["tokenizer"]
        if expected not in fingerprints(tokenizer):
            raise UserError(
                f"{run}/tokenizer is not the tokenizer of the checkpoint {folder.name}; put back "
                "the run's own files"
            )
        files = {**files_of(tokenizer), **travelling(run / "tokenizer")}
        model = Model(
            params=None,
            config=cfg,
            tokenizer=tokenizer,
            chat_template=template_of(files, str(run)),
            eos_ids=eos_of(files, {}, tokenizer, str(run)),
            name=run.name,
            context=saved.data.seq_len,
            files=files,
            source=facts,
        )

    def load_params(param_dtype: str, mesh) -> Any:
        return load_group(folder, meta, decoder.specs(cfg), param_dtype, mesh)

    return model, load_params


def load_group(
    folder: epath.Path, meta: dict, specs: Any, param_dtype: str, mesh, group: str = "model"
) -> Any:
    """A group of a checkpoint's parameters, described by `specs`, in a precision on a mesh."""
    subtree = f"params/{group}"
    stored = next(e["dtype"] for n, e in meta["leaves"].items() if n.startswith(f"{subtree}/"))
    abstract = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(
            spec.shape, jnp.dtype(stored), sharding=sharding
        ),
        specs,
        shardings_of(specs, mesh),
    )
    params = load.load(folder, abstract, subtree=subtree)
    return params if param_dtype == stored else cast_params(params, param_dtype)


def cast_params(params: Any, dtype: str) -> Any:
    """Parameters in another precision; the given arrays are used up."""
    leaves, tree = jax.tree.flatten(params)
    del params
    for i, leaf in enumerate(leaves):  # one at a time, so that two whole models are never held
        leaves[i] = leaf.astype(dtype)
        if leaves[i] is not leaf:
            leaf.delete()
    return jax.tree.unflatten(tree, leaves)


def stored_tokenizer(cfg: TokenizerConfig | None, folder: epath.Path) -> Tokenizer | None:
    """The tokenizer that `stored_settings` named, from the folder that it was saved in."""
    match cfg:
        case None:
            return None
        case Bytes():
            return ByteTokenizer()
        case SentencePiece():
            return load_sentencepiece(folder / cfg.model)
        case HfJson():
            return load_hf_json(dataclasses.replace(cfg, path=str(folder / cfg.path)))


def _run_tokenizer(cfg: TokenizerConfig, run: epath.Path) -> Tokenizer:
    own = run / "tokenizer"
    match cfg:
        case Bytes():
            return ByteTokenizer()
        case SentencePiece():
            return load_sentencepiece(own / "tokenizer.model")
        case HfJson():
            # Runs of before the settings were saved beside it name the token by the first file.
            where = own if (own / "tokenizer_config.json").exists() or cfg.eos else cfg.path
            return load_hf_json(dataclasses.replace(cfg, path=str(where), parse_special=True))


def fingerprints(tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """Fingerprints that give a text without written-out special tokens the same ids."""
    if isinstance(tokenizer, HfTokenizer):
        return tuple(tokenizer.reading_special(read).fingerprint for read in (True, False))
    return () if tokenizer is None else (tokenizer.fingerprint,)


def travelling(folder: epath.Path) -> Mapping[str, bytes]:
    """The small files that belong to a model, by name, as far as a folder has them."""
    return {name: (folder / name).read_bytes() for name in TRAVEL if (folder / name).exists()}


def keep_tokenizer(
    tokenizer: Tokenizer, folder: epath.PathLike, files: Mapping[str, bytes] | None = None
) -> None:
    """Writes a run's tokenizer, and what belongs to it where it comes from another model.

    What is there already stays: a run that goes on does not read its model's source again.
    """
    folder = epath.Path(folder)
    tokenizer.save(folder)
    extra = dict(files or {})
    if isinstance(tokenizer, HfTokenizer):
        own = {"eos_token": tokenizer.settings.eos, "bos_token": tokenizer.settings.bos}
        fields = {key: token for key, token in own.items() if token is not None}
        extra.setdefault("tokenizer_config.json", (json.dumps(fields, indent=2) + "\n").encode())
    for name, content in extra.items():
        if not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f".{name}.tmp"
            part.write_bytes(content)
            part.replace(folder / name)


def stored_settings(model: Model) -> TokenizerConfig | None:
    """How a converted checkpoint names the tokenizer that is saved in its folder."""
    tokenizer = model.tokenizer
    if isinstance(tokenizer, HfTokenizer):
        named = tokenizer.settings
        return dataclasses.replace(named, path="tokenizer/tokenizer.json")
    if isinstance(tokenizer, ByteTokenizer):
        return Bytes()
    return None if tokenizer is None else SentencePiece(model="tokenizer/tokenizer.model")
