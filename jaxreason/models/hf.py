"""Models in Hugging Face's folders: config.json, safetensors shards, tokenizer files."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.core.mesh import param_shardings
from jaxreason.core.new_folder import new_folder
from jaxreason.core.params import path_name
from jaxreason.core.precision import resolve_dtype
from jaxreason.models import decoder, hf_names, place, safetensors_io
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.hf_config import family_of, from_hf, to_hf
from jaxreason.models.hf_text import read_text
from jaxreason.models.model import Model

Load = Callable[[str, Any], Any]
"""Streams the parameters: (precision to hold them in, mesh or None) -> tree."""


def load_hf(
    folder: str | os.PathLike, *, dtype: str = "auto", param_dtype: str = "float32", mesh=None
) -> Model:
    """Opens a model's folder; tensors stream from the shards to their devices.

    Args:
      folder: local folder with config.json and safetensors.
      dtype: compute precision: auto, bfloat16 or float32.
      param_dtype: precision in which parameters are held, bfloat16 or float32.
      mesh: where the parameters live; None is the first device.

    Raises:
      UserError: something in the folder is missing, damaged or not supported.
    """
    model, load = inspect_hf(folder)
    params = load(param_dtype, mesh)
    return dataclasses.replace(model, params=params, dtype=resolve_dtype(dtype))


def inspect_hf(folder: str | os.PathLike) -> tuple[Model, Load]:
    """A model's folder without its parameters, and what loads them; everything is checked here.

    Raises:
      UserError: as `load_hf`.
    """
    root = Path(os.path.expanduser(folder))
    if "://" in os.fspath(folder) or not root.is_dir():
        raise UserError(f"{os.fspath(folder)} is no local folder; expected a model's folder")
    config = safetensors_io.read_json(root / "config.json")
    cfg, family = from_hf(config, str(root / "config.json"))
    checked = check(safetensors_io.open_folder(root), cfg, family, str(root))
    text = read_text(root, config, cfg.vocab_size)
    context = config.get("max_position_embeddings")
    model = Model(
        params=None,
        config=cfg,
        tokenizer=text.tokenizer,
        chat_template=text.chat_template,
        eos_ids=text.eos_ids,
        bos_id=text.bos_id,
        name=root.resolve().name,
        family=family,
        context=context if type(context) is int and 0 < context < 2**31 else None,
        files=text.files,
        source={"source": str(folder), "format": "huggingface"},
    )
    return model, functools.partial(load_params, checked, cfg)


Checked = list[tuple[hf_names.Place, np.ndarray]]


def check(tensors: Mapping[str, np.ndarray], cfg: ModelConfig, family: str, where: str) -> Checked:
    """Pairs every tensor with its place; nothing is read yet.

    Raises:
      UserError: a tensor is missing, or has another shape or type, or nothing reads it.
    """
    names = hf_names.FAMILIES[family]
    spelt = hf_names.find(tensors, names)
    known: set[str] = set()
    found: Checked = []
    for spot in hf_names.places(cfg, names):
        name = spelt(spot.name)
        if name not in tensors:
            raise UserError(
                f"{where}: the tensor {spot.name} is missing; expected those of a {family} model "
                f"of {cfg.num_layers} layers"
            )
        tensor = tensors[name]
        if tuple(tensor.shape) != spot.shape:
            raise UserError(
                f"{where}: the tensor {name} has shape {list(tensor.shape)}, config.json makes it "
                f"{list(spot.shape)}; expected the config of these weights"
            )
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(f"{where}: the tensor {name} has dtype {tensor.dtype}; expected floats")
        known.add(name)
        found.append((spot, tensor))
    head = names.head
    if cfg.tie_embeddings and head in tensors:
        embed = tensors[spelt(next(p.name for p, _ in found if p.row.leaves == ("embed",)))]
        if not _equal(tensors[head], embed):
            raise UserError(
                f"{where}: tie_word_embeddings is true, but {head} is not the embedding; set it "
                "to false, or remove the tensor"
            )
        known.add(head)
    if extra := hf_names.unknown(tensors, known, names):
        raise UserError(
            f"{where}: {len(extra)} tensors are not part of a {family} model, {extra[0][:80]} the "
            "first; expected a causal language model without adapters or other heads"
        )
    return found


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    rows = max(1, place.PIECE // max(1, a[:1].nbytes))
    return all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


def load_params(checked: Checked, cfg: ModelConfig, param_dtype: str, mesh) -> Any:
    """Streams checked tensors into the decoder's parameters."""

    def sources() -> Iterator[place.Source]:
        for spot, tensor in checked:
            parts = spot.row.transform.split(tensor, spot.shapes)
            for leaf, part in zip(spot.row.leaves, parts):
                yield leaf, spot.index, lambda part=part: part

    return fill_params(sources(), cfg, param_dtype, mesh)


def fill_params(sources: Iterator[place.Source], cfg: ModelConfig, param_dtype: str, mesh) -> Any:
    """The decoder's parameters, on the first device or in the shards of a mesh."""
    specs = decoder.specs(cfg)
    shardings = shardings_of(specs, mesh)
    if param_dtype not in ("float32", "bfloat16"):
        raise UserError(f"param_dtype is {param_dtype!r}; expected float32 or bfloat16")
    named = {
        path_name(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
    }
    filled = place.fill(hf_names.leaf_specs(cfg), named, sources, jnp.dtype(param_dtype))
    return jax.tree_util.tree_map_with_path(lambda path, _: filled[path_name(path)], specs)


def shardings_of(specs: Any, mesh) -> Any:
    """Where the parameters of a tree of specs live: on a mesh, or on the first device."""
    if mesh is not None:
        return param_shardings(specs, mesh)
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: alone, specs)


def save_hf(
    model: Model,
    folder: str | os.PathLike,
    *,
    dtype: str = "float32",
    shard_bytes: int = 4 << 30,
) -> None:
    """Writes a folder that `transformers` loads: the same logits, tokenizer and chat template.

    Args:
      model: its parameters, stacked or one tree a layer.
      folder: appears when all is written; must not hold anything yet.
      dtype: of the stored tensors, float32, bfloat16 or float16.
      shard_bytes: most bytes of one file, unless one tensor is larger.

    Raises:
      UserError: no family of Hugging Face has such a model, or the folder cannot be written.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {dtype!r}; expected float32, bfloat16 or float16")
    family = model.family or family_of(model.config)
    config = to_hf(model.config, family)
    tensors = list(tensors_of(model, family))
    ids = list(model.eos_ids)
    config |= {
        "torch_dtype": dtype,
        "bos_token_id": model.tokenizer.bos_id if model.tokenizer else model.bos_id,
        "eos_token_id": ids[0] if len(ids) == 1 else ids or None,
        "pad_token_id": None,
    }
    if model.context and "max_position_embeddings" not in config:
        config["max_position_embeddings"] = model.context
    with new_folder(folder) as temporary:
        safetensors_io.write_folder(temporary, tensors, dtype, shard_bytes)
        for name, content in model.files.items():
            (temporary / name).write_bytes(content)
        if model.chat_template and not (temporary / "chat_template.jinja").exists():
            (temporary / "chat_template.jinja").write_text(model.chat_template)
        if "generation_config.json" not in model.files:
            kept = {k: v for k, v in config.items() if k.endswith("_token_id") and v is not None}
            _write_json(temporary / "generation_config.json", kept)
        _write_json(temporary / "config.json", config)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def tensors_of(model: Model, family: str) -> Iterator[safetensors_io.Lazy]:
    """A model's tensors as a family names them: name, shape, and what makes the values."""
    blocks = model.params["blocks"]
    outside = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            {k: v for k, v in model.params.items() if k != "blocks"}
        )
    }
    layers = [dict(_named(layer)) for layer in blocks] if isinstance(blocks, tuple) else None
    stacked = dict(_named(blocks)) if layers is None else {}

    def leaf(name: str, index: tuple[int, ...]) -> np.ndarray:
        if not index:
            value = outside[name]
        elif layers is not None:
            value, index = layers[index[0]][name], index[1:]
        else:
            value = stacked[name]
        value = value[index] if index else value
        return np.asarray(value, np.float32) if value.dtype == jnp.bfloat16 else np.asarray(value)

    for spot in hf_names.places(model.config, hf_names.FAMILIES[family]):
        yield (
            spot.name,
            spot.shape,
            lambda spot=spot: spot.row.transform.join(
                [leaf(name, spot.index) for name in spot.row.leaves]
            ),
        )


def _named(blocks: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(blocks):
        yield f"blocks/{path_name(path)}", leaf
