"""Low-rank adapters of linear layers (LoRA: Hu et al., arXiv 2106.09685).

A layer's product becomes `x W + scale * drop(x) A B`. Adapters are a tree of their own, a part of
the model's: to train them alone, differentiate with respect to that tree. `attach` puts them into
the model's parameters for a forward, `merge` adds them to the weights for good.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxreason.core import params as P
from jaxreason.core.errors import UserError, nearest
from jaxreason.core.params import ParamSpec
from jaxreason.core.rng import named

# The decoder's linear layers, and how many axes of each weight are inputs.
INPUTS = {
    "attn/q": 1, "attn/k": 1, "attn/v": 1, "attn/o": 2, "mlp/gate": 1, "mlp/up": 1, "mlp/down": 1,
    "embed_in": 1, "embed_out": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linear layers get adapters, and of what kind."""

    rank: int = 8
    """Width between A and B (reconstructed for FiRST; 8 in the paper's GPT-2 and RoBERTa runs)."""
    alpha: float = 16.0
    """What the adapters add is scaled by alpha / rank (reconstructed for FiRST)."""
    dropout: float = 0.05
    """Part of an adapter's inputs that is dropped in training (reconstructed for FiRST)."""
    targets: tuple[str, ...] = ("attn/q", "attn/k", "attn/v", "attn/o")
    """Layers of every block: attn/q, attn/k, attn/v, attn/o, mlp/gate, mlp/up, mlp/down; OPT-350m's
    embed_in and embed_out too (reconstructed for FiRST)."""
    rank_stabilised: bool = False
    """Whether the scale is alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""

    @property
    def scale(self) -> float:
        """What stands before A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def validate(self) -> None:
        """Raises UserError for values outside their range; `specs` checks against a model."""
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; expected at least 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha is {self.alpha}; expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; expected 0 or more and below 1")
        if not self.targets:
            raise UserError(f"lora.targets is empty; expected some of {', '.join(INPUTS)}")
        for i, target in enumerate(self.targets):
            if target in self.targets[:i]:
                raise UserError(f"lora.targets names {target} twice; name it once")
            if target in ("embed", "unembed", "positions"):
                raise UserError(
                    f"lora.targets names {target}, a table; adapters are for linear layers: "
                    f"{', '.join(INPUTS)}"
                )
            if target not in INPUTS:
                hint = nearest(target, INPUTS) or f"; expected some of {', '.join(INPUTS)}"
                raise UserError(f"lora.targets names {target!r}, which is no linear layer{hint}")


@flax.struct.dataclass
class LoraWeight:
    """A weight with its adapter, which `nn.linear.linear` multiplies with.

    `base` [in..., out...], `a` [in..., r], `b` [r, out...]; `keys` [B,2,4] are a row's seed of
    dropout, None for none: bytes, so that a cast to any compute precision keeps them. Stacked over
    layers, every leaf has a layer axis in front.
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array
    keys: jax.Array | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    def drop(self, x: jax.Array) -> jax.Array:
        """`x` [B,T,...] as the adapter reads it: a part of it is 0, the rest is scaled up."""
        if self.keys is None:
            return x
        keep = _random_bits(self.keys, x.shape) >= jnp.uint32(
            min(round(self.dropout * 2**32), 2**32 - 1)
        )
        return jnp.where(keep, x * (1 / (1 - self.dropout)), jnp.zeros((), x.dtype))


def _random_bits(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32 of `shape` [B,...] from each row's two words `keys` [B,2,4].

    Each element's number in its row is mixed with one word, then with the other. Threefry's bits
    take 100 times as long on a CPU, 50 times the base's own product (docs/log.md).
    """
    words = jax.lax.bitcast_convert_type(keys.astype(jnp.uint8), jnp.uint32)
    count, size = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(1, len(shape))):
        count += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(size)
        size *= shape[axis]
    for word in (0, 1):
        count = _mix(count ^ words[:, word].reshape(-1, *(1,) * (len(shape) - 1)))
    return count


def _mix(x: jax.Array) -> jax.Array:
    """Wellons' lowbias32: a bijection of uint32 in which each bit depends on all (2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def specs(model_specs: Mapping[str, Any], cfg: LoraConfig) -> dict[str, Any]:
    """The adapters of a model described by `model_specs`: the part of its tree that is targeted.

    In a weight's place stand `a` [L,in...,r] and `b` [L,r,out...] (no L outside of the blocks). `a`
    is drawn from U(-1/sqrt(n), 1/sqrt(n)) for n inputs (official code), `b` is 0: the adapted
    model starts as the model itself. The rank is never cut by a mesh; inputs and outputs are cut as
    those of the weight.

    Raises:
      UserError: the model has no such layer, or it is one of experts.
    """
    cfg.validate()
    tree: dict[str, Any] = {}
    for target in cfg.targets:
        inside = f"blocks/{target}" in _names(model_specs)
        path = [*(["blocks"] if inside else []), *target.split("/")]
        spec = _get(model_specs, path)
        if spec is None:
            there = [t for t in INPUTS if {t, f"blocks/{t}"} & _names(model_specs)]
            raise UserError(
                f"lora.targets names {target}, which this model does not have; expected some of "
                f"{', '.join(there)}"
            )
        if "expert" in spec.axes:
            raise UserError(
                f"lora.targets names {target}, which is one of experts; expected layers of the "
                "attention"
            )
        lead, n = int(inside), INPUTS[target]
        (ins, outs), (in_axes, out_axes) = (
            (values[lead : lead + n], values[lead + n :]) for values in (spec.shape, spec.axes)
        )
        pair = {
            "a": ParamSpec(
                (*ins, cfg.rank), (*in_axes, None), _uniform(math.prod(ins)), spec.dtype
            ),
            "b": ParamSpec((cfg.rank, *outs), (None, *out_axes), P.zeros, spec.dtype),
        }
        tree = _put(tree, path, P.stack(pair, spec.shape[0]) if inside else pair)
    return tree


def _uniform(inputs: int) -> P.Init:
    """kaiming_uniform_ with a = sqrt(5), as in microsoft/LoRA and peft."""
    bound = 1 / math.sqrt(inputs)
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def attach(
    params: Mapping[str, Any],
    adapters: Mapping[str, Any],
    cfg: LoraConfig,
    key: jax.Array | None = None,
    batch: Mapping[str, jax.Array] | None = None,
) -> dict[str, Any]:
    """The model's parameters with a `LoraWeight` in the place of every adapted weight.

    With `key`, inputs of the adapters are dropped: a row's mask follows from the key, the layer,
    the target and the row's first `batch["example_id"]` [B,T], and not from the rows beside it, so
    that micro-batches drop what the whole batch drops. Without, nothing is dropped.
    """
    if cfg.dropout == 0:
        key = None
    rows = None
    if key is not None:
        if batch is None or "example_id" not in batch:
            raise ValueError("dropout needs the batch's example_id")
        rows = batch["example_id"][:, 0]
    out = dict(params)
    for path, pair in adapted(adapters):
        keys = None
        if key is not None and rows is not None:
            layers = pair["a"].shape[0] if path[0] == "blocks" else None
            keys = _row_keys(named(key, "lora/" + "/".join(path)), layers, rows)
        weight = LoraWeight(
            _get(params, path), pair["a"], pair["b"], keys, scale=cfg.scale, dropout=cfg.dropout
        )
        out = _put(out, path, weight)
    return out


def _row_keys(key: jax.Array, layers: int | None, ids_b: jax.Array) -> jax.Array:
    """Two words of four bytes for each row: [L,B,2,4], or [B,2,4] outside of the blocks."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    rows = lambda key: jax.random.key_data(fold(key, ids_b))  # noqa: E731
    words = rows(key) if layers is None else jax.vmap(rows)(jax.random.split(key, layers))
    return jax.lax.bitcast_convert_type(words, jnp.uint8)


def merge(
    params: Mapping[str, Any], adapters: Mapping[str, Any], cfg: LoraConfig
) -> dict[str, Any]:
    """The model's parameters with the adapters added: a plain tree, of the base's precision.

    Sums in float32, one layer at a time.
    """

    def one(layer):
        w, a, b = layer
        product = jnp.matmul(
            a.astype(jnp.float32).reshape(-1, a.shape[-1]),
            b.astype(jnp.float32).reshape(b.shape[0], -1),
            precision=jax.lax.Precision.HIGHEST,
        )
        wide = w.astype(jnp.float32) + cfg.scale * product.reshape(w.shape)
        return wide.astype(w.dtype)

    out = dict(params)
    for path, pair in adapted(adapters):
        layer = (jnp.asarray(_get(params, path)), jnp.asarray(pair["a"]), jnp.asarray(pair["b"]))
        merged = jax.lax.map(one, layer) if path[0] == "blocks" else one(layer)
        out = _put(out, path, merged)
    return out


def adapted(adapters: Mapping[str, Any]) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
    """Every adapted weight: its path in the model's tree, and its `a` and `b`."""
    for name, inner in adapters.items():
        if set(inner) == {"a", "b"}:
            yield [name], inner
        else:
            yield from (([name, *path], pair) for path, pair in adapted(inner))


def _names(tree: Any) -> set[str]:
    return {P.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def _get(tree: Any, path: list[str]) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _put(tree: Mapping[str, Any], path: list[str], leaf: Any) -> dict[str, Any]:
    """A copy of the tree with another leaf; what is not on the way is shared."""
    head, *rest = path
    return {**tree, head: _put(tree.get(head, {}), rest, leaf) if rest else leaf}
