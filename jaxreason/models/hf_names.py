"""Where each of our parameters is in a Hugging Face checkpoint: one table a family, read both ways.

A row names our leaf (or the leaves that one tensor fuses), the tensor's name and a transform. The
transform gives the tensor's shape from the leaves', splits a tensor into views of the leaves and
joins leaves to a tensor; it never copies more than one tensor. `{l}` is the layer, `{e}` an expert.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.core.params import ParamSpec, path_name
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """One tensor against our leaves, whose shapes (without layer and expert axes) are given."""

    shape: Callable[[list[Shape]], Shape]
    """Shape of the tensor."""
    split: Callable[[np.ndarray, list[Shape]], list[np.ndarray]]
    """The leaves as views of the tensor."""
    join: Callable[[list[np.ndarray]], np.ndarray]
    """The tensor of the leaves."""


def matrix(inputs: int = 1) -> Transform:
    """A linear layer: ours is [*in, *out] with `inputs` input axes, theirs [out, in]."""

    def split(x: np.ndarray, shapes: list[Shape]) -> list[np.ndarray]:
        ins, outs = shapes[0][:inputs], shapes[0][inputs:]
        x = x.reshape(*outs, *ins)
        return [x.transpose(*range(len(outs), x.ndim), *range(len(outs)))]

    return Transform(
        lambda shapes: (math.prod(shapes[0][inputs:]), math.prod(shapes[0][:inputs])),
        split,
        lambda leaves: leaves[0].reshape(math.prod(leaves[0].shape[:inputs]), -1).T,
    )


flat = Transform(
    lambda shapes: (math.prod(shapes[0]),),
    lambda x, shapes: [x.reshape(shapes[0])],
    lambda leaves: leaves[0].reshape(-1),
)
"""A vector: ours may have head and feature axes."""
same = Transform(lambda shapes: shapes[0], lambda x, _: [x], lambda leaves: leaves[0])


def _offset_join(leaves: list[np.ndarray]) -> np.ndarray:
    table = leaves[0]
    return np.concatenate([np.zeros((2, *table.shape[1:]), table.dtype), table])


offset = Transform(
    lambda shapes: (shapes[0][0] + 2, *shapes[0][1:]), lambda x, _: [x[2:]], _offset_join
)
"""OPT's learned positions: two rows in front that no real token reads."""


def _fused_split(x: np.ndarray, shapes: list[Shape]) -> list[np.ndarray]:
    heads, width = shapes[0][-2:]
    x = x.reshape(heads, 3, width, *shapes[0][:-2])
    parts = [x[:, i] for i in range(3)]
    return [part.transpose(2, 0, 1) if part.ndim == 3 else part for part in parts]


def _fused_join(leaves: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(leaves, axis=-2)  # [D,H,3,K] or [H,3,K]
    if stacked.ndim == 3:
        return stacked.reshape(-1)
    return stacked.reshape(stacked.shape[0], -1).T


fused = Transform(
    lambda shapes: (3 * math.prod(shapes[0][-2:]), *shapes[0][:-2]), _fused_split, _fused_join
)
"""GPT-NeoX's query_key_value: a head's query, key and value rows follow one another."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor: its name, our leaves in it, the transform between them."""

    name: str
    leaves: tuple[str, ...]
    transform: Transform


@dataclasses.dataclass(frozen=True)
class Names:
    """A family's tensors. `prefix` stands before the names of the base model."""

    prefix: str
    rows: tuple[Row, ...]
    head: str
    """Name of the output matrix, left out where it is tied to the embedding."""
    other_prefixes: tuple[str, ...] = ("",)
    """What may stand there instead in checkpoints of the base model alone."""
    ignore: str = r"rotary_emb\.inv_freq$"
    """Tensors that are no parameters."""


def _row(name: str, leaf: str, transform: Transform) -> Row:
    return Row(name, tuple(leaf.split()), transform)


def _norm(theirs: str, ours: str, layer: bool) -> list[Row]:
    if not layer:
        return [_row(f"{theirs}.weight", ours, flat)]
    return [
        _row(f"{theirs}.weight", f"{ours}/scale", flat),
        _row(f"{theirs}.bias", f"{ours}/bias", flat),
    ]


def _linear(theirs: str, ours: str, bias: str, inputs: int = 1) -> list[Row]:
    return [
        _row(f"{theirs}.weight", ours, matrix(inputs)),
        _row(f"{theirs}.bias", bias, flat),
    ]


def _attention(attn: str, out: str) -> list[Row]:
    rows = []
    for ours in "qkv":
        rows += _linear(f"{attn}.{ours}_proj", f"blocks/attn/{ours}", f"blocks/attn/{ours}_bias")
    return rows + _linear(f"{attn}.{out}", "blocks/attn/o", "blocks/attn/o_bias", 2)


def _mlp(theirs: Mapping[str, str], name: str) -> list[Row]:
    rows = []
    for ours, module in theirs.items():
        rows += _linear(f"{name}{module}", f"blocks/mlp/{ours}", f"blocks/mlp/{ours}_bias")
    return rows


_GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_LAYER = "layers.{l}."
_LLAMA = (
    _row("embed_tokens.weight", "embed", same),
    *_norm(f"{_LAYER}input_layernorm", "blocks/attn_norm", False),
    *_attention(f"{_LAYER}self_attn", "o_proj"),
    _row(f"{_LAYER}self_attn.q_norm.weight", "blocks/attn/q_norm", flat),
    _row(f"{_LAYER}self_attn.k_norm.weight", "blocks/attn/k_norm", flat),
    *_norm(f"{_LAYER}post_attention_layernorm", "blocks/mlp_norm", False),
)
_LLAMA_END = _norm("norm", "final_norm", False)
_DENSE = Names("model.", (*_LLAMA, *_mlp(_GATED, f"{_LAYER}mlp."), *_LLAMA_END), "lm_head.weight")

FAMILIES: dict[str, Names] = {
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "olmoe": Names(
        "model.",
        (
            *_LLAMA,
            _row(f"{_LAYER}mlp.gate.weight", "blocks/mlp/router", matrix()),
            *(
                _row(f"{_LAYER}mlp.experts.{{e}}.{module}.weight", f"blocks/mlp/{ours}", matrix())
                for ours, module in _GATED.items()
            ),
            *_LLAMA_END,
        ),
        "lm_head.weight",
    ),
    "gpt_neox": Names(
        "gpt_neox.",
        (
            _row("embed_in.weight", "embed", same),
            *_norm(f"{_LAYER}input_layernorm", "blocks/attn_norm", True),
            _row(
                f"{_LAYER}attention.query_key_value.weight",
                "blocks/attn/q blocks/attn/k blocks/attn/v",
                fused,
            ),
            _row(
                f"{_LAYER}attention.query_key_value.bias",
                "blocks/attn/q_bias blocks/attn/k_bias blocks/attn/v_bias",
                fused,
            ),
            *_linear(f"{_LAYER}attention.dense", "blocks/attn/o", "blocks/attn/o_bias", 2),
            *_norm(f"{_LAYER}post_attention_layernorm", "blocks/mlp_norm", True),
            *_mlp({"up": "dense_h_to_4h", "down": "dense_4h_to_h"}, f"{_LAYER}mlp."),
            *_norm("final_layer_norm", "final_norm", True),
        ),
        "embed_out.weight",
        ignore=r"(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)$",
    ),
    "opt": Names(
        "model.decoder.",
        (
            _row("embed_tokens.weight", "embed", same),
            _row("embed_positions.weight", "positions", offset),
            _row("project_in.weight", "embed_in", matrix()),
            *_norm(f"{_LAYER}self_attn_layer_norm", "blocks/attn_norm", True),
            *_attention(f"{_LAYER}self_attn", "out_proj"),
            *_norm(f"{_LAYER}final_layer_norm", "blocks/mlp_norm", True),
            *_mlp({"up": "fc1", "down": "fc2"}, _LAYER),
            *_norm("final_layer_norm", "final_norm", True),
            _row("project_out.weight", "embed_out", matrix()),
        ),
        "lm_head.weight",
        other_prefixes=("decoder.", ""),
    ),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor: its name, its row, and where in our stacked leaves it belongs."""

    name: str
    row: Row
    index: tuple[int, ...]
    """Layer, or layer and expert; empty for leaves outside the blocks."""
    shapes: list[Shape]
    """Shapes of the row's leaves without the index."""

    @property
    def shape(self) -> Shape:
        """Shape of the tensor."""
        return self.row.transform.shape(self.shapes)


def leaf_specs(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """The decoder's parameters by name, such as `blocks/attn/q` (with the layer axis)."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(decoder.specs(cfg))
    return {path_name(path): spec for path, spec in leaves}


def places(cfg: ModelConfig, names: Names) -> Iterator[Place]:
    """Every tensor that a model of this shape has in a family's checkpoints, layer by layer.

    Raises:
      UserError: the family has no tensor for one of the parameters.
    """
    specs = leaf_specs(cfg)
    rows = [row for row in names.rows if row.leaves[0] in specs]
    if "unembed" in specs:
        rows.append(Row(names.head, ("unembed",), matrix()))
    covered = {leaf for row in rows for leaf in row.leaves}
    if missing := next((leaf for leaf in specs if leaf not in covered), None):
        raise UserError(
            f"{names.head} and its like leave no place for the parameter {missing}; keep the "
            "model as a checkpoint of this program"
        )
    outside = [row for row in rows if "{l}" not in row.name]
    inside = [row for row in rows if "{l}" in row.name]

    def place(row: Row, index: tuple[int, ...]) -> Place:
        values = dict(zip(("l", "e"), index))
        prefix = "" if row.leaves == ("unembed",) else names.prefix
        shapes = [tuple(specs[leaf].shape[len(index) :]) for leaf in row.leaves]
        return Place(prefix + row.name.format(**values), row, index, shapes)

    yield from (place(row, ()) for row in outside)
    for layer in range(cfg.num_layers):
        for row in inside:
            if "{e}" not in row.name:
                yield place(row, (layer,))
                continue
            experts = specs[row.leaves[0]].shape[1]
            yield from (place(row, (layer, e)) for e in range(experts))


def find(tensors: Mapping[str, Any], names: Names) -> Callable[[str], str]:
    """How a tensor's full name is written in this checkpoint: with the prefix, or without."""
    for prefix in (names.prefix, *names.other_prefixes):
        if prefix + names.rows[0].name in tensors:
            return lambda name, prefix=prefix: (
                prefix + name.removeprefix(names.prefix) if name.startswith(names.prefix) else name
            )
    return lambda name: name


def unknown(tensors: Mapping[str, Any], known: set[str], names: Names) -> list[str]:
    """Tensors of a checkpoint that nothing reads, but for those that are no parameters."""
    ignore = re.compile(names.ignore)
    return [name for name in tensors if name not in known and not ignore.search(name)]
