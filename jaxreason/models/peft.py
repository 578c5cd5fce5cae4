"""Adapters in peft's folders: adapter_config.json and adapter_model.safetensors.

peft names a module by the tensor of its weight and stores A [r, in] and B [out, r]. One module may
be several of our weights (GPT-NeoX's query_key_value): read, they share its A. Written, adapters
with an A of their own lie side by side in one of the sum of their ranks, the same function.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.core.new_folder import new_folder
from jaxreason.models import hf_names, safetensors_io
from jaxreason.models.hf_config import family_of
from jaxreason.models.hf_names import Place, Row
from jaxreason.models.model import Model
from jaxreason.nn.lora import INPUTS, LoraConfig, adapted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings that change nothing in what a saved adapter computes.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "revision", "target_modules",
    "task_type", "use_rslora",
}  # fmt: skip
# Initial values that leave the base as it is; others (PiSSA, OLoRA, LoftQ) were taken out of it.
_PLAIN_INIT = ("gaussian", "orthogonal", "eva")


def _names(row: Row) -> list[str]:
    """A module's targets, such as `attn/q`; none where it is no linear layer of ours."""
    names = [leaf.removeprefix("blocks/") for leaf in row.leaves]
    return names if row.name.endswith(".weight") and set(names) <= set(INPUTS) else []


def _modules(cfg, family: str) -> Iterator[tuple[str, Place]]:
    """The linear layers of a family by name, such as `model.layers.0.self_attn.q_proj`."""
    for spot in hf_names.places(cfg, hf_names.FAMILIES[family]):
        if _names(spot.row) and "{e}" not in spot.row.name:
            yield spot.name.removesuffix(".weight"), spot


def _a_transform(row: Row) -> hf_names.Transform:
    """A [r, in] against `a` [in..., r]."""
    return hf_names.matrix(INPUTS[_names(row)[0]])


def _b_transform(row: Row) -> hf_names.Transform:
    """B [out, r] against `b` [r, out...]: the weight's, the rank in the place of the inputs."""
    return row.transform if len(row.leaves) > 1 else hf_names.matrix()


def save_peft(
    adapters: Mapping[str, Any],
    cfg: LoraConfig,
    model: Model,
    folder: str | os.PathLike,
    *,
    base: str | None = None,
    dtype: str = "float32",
) -> None:
    """Writes adapters as a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
      adapters: tree of `nn.lora.specs`.
      cfg: what they were made with.
      model: their base; its parameters are not read.
      folder: appears when all is written; must not hold anything yet.
      base: what peft is told the base is called; None: the model's name.
      dtype: of the stored tensors, float32, bfloat16 or float16.

    Raises:
      UserError: no family of Hugging Face has such a model, or the folder cannot be written.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {dtype!r}; expected float32, bfloat16 or float16")
    family = model.family or family_of(model.config)
    pairs = {"/".join(path): pair for path, pair in adapted(adapters)}
    spots = [
        (name, spot) for name, spot in _modules(model.config, family)
        if any(leaf in pairs for leaf in spot.row.leaves)
    ]  # fmt: skip
    if lost := set(pairs) - {leaf for _, spot in spots for leaf in spot.row.leaves}:
        raise UserError(f"peft has no place for an adapter of {min(lost)} in a {family} model")
    rank = max(cfg.rank * _blocks(spot.row, pairs) for _, spot in spots)
    # One rank and one scale for all modules: narrower ones get zeros.
    alpha = cfg.scale * (math.sqrt(rank) if cfg.rank_stabilised else rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or model.name or None,
        "r": rank,
        "lora_alpha": cfg.alpha if rank == cfg.rank else alpha,
        "lora_dropout": cfg.dropout,
        "use_rslora": cfg.rank_stabilised,
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in spots}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with new_folder(folder) as temporary:
        tensors = list(_tensors(spots, pairs, rank))
        safetensors_io.write_folder(temporary, tensors, dtype, shard_bytes=2**62)
        (temporary / "model.safetensors").rename(temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _blocks(row: Row, pairs: Mapping[str, Any]) -> int:
    """How many adapters lie side by side in a module: one where they share their A."""
    there = [np.asarray(pairs[leaf]["a"]) for leaf in row.leaves if leaf in pairs]
    shared = len(there) == len(row.leaves) and all(np.array_equal(a, there[0]) for a in there)
    return 1 if shared else len(there)


def _tensors(
    spots: list[tuple[str, Place]], pairs: Mapping[str, Any], rank: int
) -> Iterator[safetensors_io.Lazy]:
    """Both tensors of every module: name, shape, and what makes the values."""
    for name, spot in spots:
        row, blocks = spot.row, _blocks(spot.row, pairs)
        ins = math.prod(spot.shapes[0][: INPUTS[_names(row)[0]]])
        outs = spot.shape[0]

        def make_a(spot=spot, blocks=blocks, ins=ins):
            there = [leaf for leaf in spot.row.leaves if leaf in pairs][:blocks]
            parts = [_leaf(pairs[leaf]["a"], spot.index) for leaf in there]
            joined = [_a_transform(spot.row).join([part]) for part in parts]
            return _widened(np.concatenate(joined), (rank, ins))

        def make_b(spot=spot, blocks=blocks, outs=outs):
            there = [leaf for leaf in spot.row.leaves if leaf in pairs]
            width = _leaf(pairs[there[0]]["b"], spot.index).shape[0]
            leaves = []
            for leaf, shape in zip(spot.row.leaves, spot.shapes):
                tail = shape[INPUTS[leaf.removeprefix("blocks/")] :]
                whole = np.zeros((width * blocks, *tail), np.float32)
                if leaf in pairs:
                    first = width * there.index(leaf) if blocks > 1 else 0
                    whole[first : first + width] = _leaf(pairs[leaf]["b"], spot.index)
                leaves.append(whole)
            return _widened(_b_transform(spot.row).join(leaves), (outs, rank))

        yield f"{_PREFIX}{name}.lora_A.weight", (rank, ins), make_a
        yield f"{_PREFIX}{name}.lora_B.weight", (outs, rank), make_b


def _leaf(value: Any, index: tuple[int, ...]) -> np.ndarray:
    return np.asarray(value[index] if index else value, np.float32)


def _widened(x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.pad(x, [(0, size - have) for size, have in zip(shape, x.shape, strict=True)])


def load_peft(folder: str | os.PathLike, model: Model) -> tuple[dict[str, Any], LoraConfig]:
    """Adapters of peft for a model of ours: the tree of `nn.lora.specs` in float32, its config.

    Args:
      folder: what `save_pretrained` of peft, or `save_peft`, wrote.
      model: their base; its parameters are not read.

    Raises:
      UserError: something is missing or damaged, belongs to another base, or is another method than
        plain LoRA with one rank.
    """
    root = Path(os.path.expanduser(folder))
    if "://" in os.fspath(folder) or not root.is_dir():
        raise UserError(f"{os.fspath(folder)} is no local folder; expected an adapter of peft")
    where = str(root / CONFIG)
    settings = safetensors_io.read_json(root / CONFIG)
    _check_settings(settings, where)
    family = model.family or family_of(model.config)
    pickle = root / "adapter_model.bin"
    if pickle.exists() and not (root / WEIGHTS).exists():
        raise UserError(
            f"{pickle} is a pickle, which could run any code and is never opened; save the adapter "
            "as safetensors (peft: save_pretrained)"
        )
    tensors = safetensors_io.open_file(root / WEIGHTS)
    rank = settings["r"]
    leaves, found = _read(tensors, model, family, rank, str(root / WEIGHTS))
    _check_targets(settings.get("target_modules"), found, where)
    cfg = LoraConfig(
        rank=rank,
        alpha=float(settings["lora_alpha"]),
        dropout=float(settings.get("lora_dropout") or 0.0),
        targets=tuple(t for t in INPUTS if {t, f"blocks/{t}"} & set(leaves)),
        rank_stabilised=bool(settings.get("use_rslora")),
    )
    cfg.validate()
    tree: dict[str, Any] = {}
    for name, layers in leaves.items():
        at = tree
        for part in name.split("/"):
            at = at.setdefault(part, {})
        for i, kind in enumerate("ab"):
            parts = [pair[i] for pair in layers]
            at[kind] = np.stack(parts) if name.startswith("blocks/") else parts[0]
    return tree, cfg


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_settings(settings: Mapping[str, Any], where: str) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{where}: peft_type is {str(kind)[:40]!r}; expected 'LORA'")
    rank: Any = settings.get("r")
    alpha: Any = settings.get("lora_alpha")
    if type(rank) is not int or not 0 < rank < 2**20:
        raise UserError(f"{where}: r is {str(rank)[:40]!r}; expected a rank, 1 or more")
    if not _is_number(alpha) or not 0 < alpha < math.inf:
        raise UserError(f"{where}: lora_alpha is {str(alpha)[:40]!r}; expected a number above 0")
    dropout: Any = settings.get("lora_dropout") or 0.0
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"{where}: lora_dropout is {str(dropout)[:40]!r}; expected 0 to below 1")
    init = settings.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in _PLAIN_INIT):
        raise UserError(
            f"{where}: init_lora_weights is {str(init)[:40]!r}, which took the adapter's start out "
            "of the base; convert it with peft (path_initial_model_for_weight_conversion) first"
        )
    for name, value in settings.items():
        usual = value in ("none", "None") if name == "bias" else not value
        if not usual and name not in _WITHOUT_EFFECT:
            raise UserError(
                f"{where}: {name[:40]} is {json.dumps(value)[:60]}, which is not supported; "
                "expected plain LoRA of one rank (use_rslora is supported), or let peft merge it "
                "into the base (merge_and_unload) and give that model"
            )


Pair = tuple[np.ndarray, np.ndarray]


def _read(
    tensors: Mapping[str, np.ndarray], model: Model, family: str, rank: int, where: str
) -> tuple[dict[str, list[Pair]], list[str]]:
    """Each leaf's `a` and `b`, a pair a layer, and the names of the adapted modules."""
    modules = list(_modules(model.config, family))
    keys = {name: [f"{_PREFIX}{name}.lora_{x}.weight" for x in "AB"] for name, _ in modules}
    known = {key for pair in keys.values() for key in pair}
    if strange := next((name for name in tensors if name not in known), None):
        there = sorted({name.rpartition(".")[2] for name, _ in modules})
        raise UserError(
            f"{where}: the tensor {strange[:100]} is no adapter of a linear layer of this {family} "
            f"model of {model.config.num_layers} layers; expected those of {', '.join(there)}"
        )
    rows = {spot.row.name for name, spot in modules if any(key in tensors for key in keys[name])}
    if not rows:
        raise UserError(f"{where} holds no tensors; expected an adapter's")
    leaves: dict[str, list[Pair]] = {}
    found = []
    for name, spot in modules:
        if spot.row.name not in rows:
            continue
        ins = math.prod(spot.shapes[0][: INPUTS[_names(spot.row)[0]]])
        pair = []
        for key, shape in zip(keys[name], ((rank, ins), (spot.shape[0], rank))):
            if key not in tensors:
                raise UserError(
                    f"{where}: the tensor {key} is missing; expected adapters of all "
                    f"{model.config.num_layers} layers of the base"
                )
            value = tensors[key]
            if value.shape != shape:
                raise UserError(
                    f"{where}: the tensor {key} has shape {list(value.shape)}, this base and rank "
                    f"{rank} make it {list(shape)}; expected the base that it was trained on"
                )
            if not jnp.issubdtype(value.dtype, jnp.floating):
                raise UserError(f"{where}: the tensor {key} has dtype {value.dtype}; want floats")
            pair.append(np.asarray(value, np.float32))
        found.append(name)
        for leaf, ours in zip(spot.row.leaves, _split(spot, pair[0], pair[1]), strict=True):
            leaves.setdefault(leaf, []).append(ours)
    return leaves, found


def _split(spot: Place, a: np.ndarray, b: np.ndarray) -> list[Pair]:
    """A module's tensors as the pairs of our leaves."""
    n, rank = INPUTS[_names(spot.row)[0]], len(a)
    ours_a = _a_transform(spot.row).split(a, [(*spot.shapes[0][:n], rank)])[0]
    ours_b = _b_transform(spot.row).split(b, [(rank, *shape[n:]) for shape in spot.shapes])
    return [(ours_a, part) for part in ours_b]


def _check_targets(targets: Any, found: list[str], where: str) -> None:
    """Each listed module has tensors; a pattern (one string) is peft's own to read."""
    for target in targets if isinstance(targets, list) else ():
        if not any(f".{name}".endswith(f".{target}") for name in found):
            raise UserError(
                f"{where}: target_modules names {str(target)[:60]!r}, of which there are no tensors"
                f"; expected some of {', '.join(sorted({n.rpartition('.')[2] for n in found}))}"
            )
