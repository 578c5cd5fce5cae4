"""One decoder-only transformer whose settings are Llama, Qwen2 and Qwen3."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.core.mesh import shard
from jaxreason.core.outputs import Outputs
from jaxreason.core.params import ParamSpec
from jaxreason.nn import kv_cache, rope
from jaxreason.nn.attention import attention, make_mask
from jaxreason.nn.linear import linear, resolve_kernels
from jaxreason.nn.mlp import swiglu, swiglu_specs
from jaxreason.nn.norm import rms_norm, rms_norm_specs
from jaxreason.nn.rope import LinearScaling, Llama3Scaling
from jaxreason.nn.stack import run_stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder."""

    vocab_size: int = 0
    """Rows of the embedding; 0 takes the tokenizer's size, rounded up to a multiple of 64."""
    d_model: int = 256
    """Width of the residual stream."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 0
    """Key and value heads; 0 means as many as query heads."""
    head_dim: int = 0
    """Width of a head; 0 means d_model / num_heads."""
    d_ff: int = 704
    """Width of the feed-forward layer."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: LinearScaling | Llama3Scaling | None = None
    """Context extension of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Whether logits use the transposed embedding."""
    qkv_bias: bool = False
    """Bias on query, key and value projections (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm of every query and key head before RoPE (Qwen3)."""
    window: int | None = None
    """Sliding attention window in tokens; None attends to the whole segment."""
    attention_soft_cap: float | None = None
    """Bounds attention logits by cap * tanh(logits / cap)."""
    logit_soft_cap: float | None = None
    """Bounds output logits the same way."""
    init_std: float = 0.02
    """Standard deviation of initial weights; output projections divide it by sqrt(2 * layers)."""
    kernels: Literal["auto", "xla", "cpu"] = "auto"
    """Forms of the parts: cpu are those that XLA's CPU compiler runs fast. auto: by the device."""
    attention: Literal["auto", "reference", "cpu"] = "auto"
    """Attention backend. auto: by `kernels`."""
    layers: Literal["auto", "scan", "unroll"] = "auto"
    """Scan compiles one layer; unroll runs faster on CPU. auto: by `kernels`."""
    remat: Literal["none", "full", "dots", "minimal"] = "none"
    """What the backward pass computes again: nothing, everything, all but products, or all but
    products without a batch dimension."""

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.d_model // self.num_heads

    def validate(self) -> None:
        """Raises UserError for shapes that do not fit together."""
        for name in ("d_model", "num_layers", "num_heads", "d_ff"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; expected at least 1")
        if not self.head_dim and self.d_model % self.num_heads:
            raise UserError(
                f"model.d_model {self.d_model} is not a multiple of model.num_heads "
                f"{self.num_heads}; change one of them or set model.head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads "
                f"{self.kv_heads}; every key head serves the same number of query heads"
            )
        if self.head_width % 2:
            raise UserError(f"head width is {self.head_width}; RoPE needs an even one")


def specs(cfg: ModelConfig) -> dict[str, Any]:
    """The decoder's parameters: `embed` [V,D], `blocks`, `final_norm` [D], `unembed` [D,V]."""
    d, h, g, k = cfg.d_model, cfg.num_heads, cfg.kv_heads, cfg.head_width
    std, out_std = cfg.init_std, cfg.init_std / math.sqrt(2 * cfg.num_layers)
    attn = {
        "q": ParamSpec((d, h, k), ("embed", "heads", "head_dim"), P.normal(std)),
        "k": ParamSpec((d, g, k), ("embed", "kv_heads", "head_dim"), P.normal(std)),
        "v": ParamSpec((d, g, k), ("embed", "kv_heads", "head_dim"), P.normal(std)),
        "o": ParamSpec((h, k, d), ("heads", "head_dim", "embed"), P.normal(out_std)),
    }
    if cfg.qkv_bias:
        attn["q_bias"] = ParamSpec((h, k), ("heads", "head_dim"), P.zeros)
        attn["k_bias"] = ParamSpec((g, k), ("kv_heads", "head_dim"), P.zeros)
        attn["v_bias"] = ParamSpec((g, k), ("kv_heads", "head_dim"), P.zeros)
    if cfg.qk_norm:
        attn["q_norm"] = rms_norm_specs(k, "head_dim")
        attn["k_norm"] = rms_norm_specs(k, "head_dim")
    block = {
        "attn_norm": rms_norm_specs(d),
        "attn": attn,
        "mlp_norm": rms_norm_specs(d),
        "mlp": swiglu_specs(d, cfg.d_ff, std, out_std),
    }
    tree = {
        "embed": ParamSpec((cfg.vocab_size, d), ("vocab", "embed"), P.normal(std)),
        "blocks": P.stack(block, cfg.num_layers),
        "final_norm": rms_norm_specs(d),
    }
    if not cfg.tie_embeddings:
        tree["unembed"] = ParamSpec((d, cfg.vocab_size), ("embed", "vocab"), P.normal(std))
    return tree


def init_cache(cfg: ModelConfig, batch: int, capacity: int, dtype) -> kv_cache.KVCache:
    """An empty key-value cache for `batch` rows of `capacity` tokens."""
    return kv_cache.make_cache(cfg.num_layers, batch, capacity, cfg.kv_heads, cfg.head_width, dtype)


def _heads(cfg: ModelConfig, p, x_btd, name: str) -> jax.Array:
    y = linear(x_btd, p[name], cfg.kernels)
    if cfg.qkv_bias:
        y = y + p[f"{name}_bias"][None, None]
    if cfg.qk_norm and name != "v":
        y = rms_norm(y, p[f"{name}_norm"], cfg.norm_eps, cfg.kernels)
    return shard(y, "batch", "seq", "heads" if name == "q" else "kv_heads", None)


def _block(cfg: ModelConfig, context, p, x_btd: jax.Array, layer):
    """One pre-norm block; `layer` holds its cache (or nothing). Returns (x, new cache)."""
    cos, sin, attend = context
    h = rms_norm(x_btd, p["attn_norm"], cfg.norm_eps, cfg.kernels)
    q = rope.apply_rope(_heads(cfg, p["attn"], h, "q"), cos, sin, cfg.kernels)
    k = rope.apply_rope(_heads(cfg, p["attn"], h, "k"), cos, sin, cfg.kernels)
    v = _heads(cfg, p["attn"], h, "v")
    o, cache = attend(q, k, v, layer)
    o = linear(o, p["attn"]["o"], cfg.kernels, inputs=2)
    x_btd = shard(x_btd + o, "batch", "seq", "embed")
    h = rms_norm(x_btd, p["mlp_norm"], cfg.norm_eps, cfg.kernels)
    return shard(x_btd + swiglu(p["mlp"], h, cfg.kernels), "batch", "seq", "embed"), cache


def _attend_to_batch(cfg: ModelConfig, positions, segments, dtype):
    mask = make_mask(
        q_positions=positions, kv_positions=positions, q_segments=segments, kv_segments=segments,
        window=cfg.window, backend=cfg.attention, dtype=dtype,
    )  # fmt: skip

    def attend(q, k, v, _):
        soft_cap, backend = cfg.attention_soft_cap, cfg.attention
        return attention(q, k, v, mask, soft_cap=soft_cap, backend=backend), ()

    return attend


def _attend_to_cache(cfg: ModelConfig, positions, segments, cache: kv_cache.KVCache):
    slots = jnp.arange(cache.capacity)[None, :]
    written = (segments > 0).sum(axis=1).astype(jnp.int32)
    stored = (slots < (cache.lengths + written)[:, None]).astype(jnp.int32)
    mask = make_mask(
        q_positions=positions, kv_positions=jnp.broadcast_to(slots, stored.shape),
        q_segments=(segments > 0).astype(jnp.int32), kv_segments=stored,
        window=cfg.window, backend="reference", dtype=None,
    )  # fmt: skip

    def attend(q, k, v, layer):
        k_all, v_all = kv_cache.append(layer[0], layer[1], k, v, cache.lengths)
        o = attention(
            q, k_all.astype(q.dtype), v_all.astype(q.dtype), mask,
            soft_cap=cfg.attention_soft_cap, backend="reference",
        )  # fmt: skip
        return o, (k_all, v_all)

    return attend, written


def resolve(cfg: ModelConfig, platform: str | None = None) -> ModelConfig:
    """Replaces every `auto` by what it means on a platform (None: JAX's default)."""
    kernels = resolve_kernels(cfg.kernels, platform)
    plain = kernels == "xla" or cfg.attention_soft_cap is not None
    auto = {
        "attention": "reference" if plain else "cpu",
        "layers": "scan" if kernels == "xla" else "unroll",
    }
    changes = {name: value for name, value in auto.items() if getattr(cfg, name) == "auto"}
    return dataclasses.replace(cfg, kernels=kernels, **changes)


def cast(params, dtype):
    """Matrices in the compute precision; norm scales and the embedding stay as they are.

    One cast a step: sharded parameters are then gathered in the compute precision. The embedding's
    gradient sums over every occurrence of a token, which in bfloat16 stalls at 256 terms.
    """

    def one(path, leaf):
        name = P.path_name(path)
        return leaf if name.endswith("norm") or name == "embed" else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def forward(
    params,
    cfg: ModelConfig,
    batch,
    *,
    dtype=jnp.float32,
    capture: tuple[int, ...] = (),
    cache: kv_cache.KVCache | None = None,
) -> Outputs:
    """Runs the decoder over `batch["tokens"]` [B,T] (or `inputs_embeds` [B,T,D]).

    `positions` and `segment_ids` [B,T] belong to the batch. With `cache`, every row is one segment
    whose new tokens stand first (segment 1, then padding 0), positions continue from the cache's
    lengths, and the updated cache comes back in the outputs. `capture` names residual streams to
    return: 0 the embedding, k after block k.
    """
    cfg = resolve(cfg)
    params = cast(params, dtype)
    positions, segments = batch["positions"], batch["segment_ids"]
    if batch.get("inputs_embeds") is not None:
        x = batch["inputs_embeds"].astype(dtype)
    else:
        x = jnp.take(params["embed"], batch["tokens"], axis=0).astype(dtype)
    x = shard(x, "batch", "seq", "embed")
    freq = rope.frequencies(cfg.head_width, cfg.rope_base, cfg.rope_scaling)
    cos, sin = rope.rope_tables(positions, freq)
    if cfg.kernels == "cpu":  # Once a step: XLA would take the cosines again in every layer.
        cos, sin = jax.lax.optimization_barrier((cos, sin))
    if cache is None:
        block = functools.partial(
            _block, cfg, (cos, sin, _attend_to_batch(cfg, positions, segments, dtype))
        )
        x, captured, _ = run_stack(
            [(block, cfg.num_layers)], [params["blocks"]], x, [()],
            capture=capture, mode=cfg.layers, remat=cfg.remat,
        )  # fmt: skip
        new_cache = None
    else:
        attend, written = _attend_to_cache(cfg, positions, segments, cache)
        captured, keys, values = {0: x} if 0 in capture else {}, [], []
        for i in range(cfg.num_layers):
            p = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            x, (k, v) = _block(cfg, (cos, sin, attend), p, x, (cache.k[i], cache.v[i]))
            keys, values = [*keys, k], [*values, v]
            if i + 1 in capture:
                captured[i + 1] = x
        new_cache = dataclasses.replace(cache, k=tuple(keys), v=tuple(values)).advance(written)
    final = rms_norm(x, params["final_norm"], cfg.norm_eps, cfg.kernels)
    unembed = params["embed"].T.astype(dtype) if cfg.tie_embeddings else params["unembed"]
    return Outputs(final, captured, unembed, cfg.logit_soft_cap, cfg.kernels, cache=new_cache)


def logits(outputs: Outputs) -> jax.Array:
    """All logits [B,T,V] in float32; training uses them by chunks instead."""
    out = jnp.einsum(
        "btd,dv->btv", outputs.final, outputs.unembed, preferred_element_type=jnp.float32
    )
    cap = outputs.soft_cap
    return out if cap is None else cap * jnp.tanh(out / cap)


def forward_flops(cfg: ModelConfig, seq_len: int, *, depth: int | None = None) -> int:
    """FLOPs a token of one forward: 2 a multiply-add, causal attention counted at T/2.

    With `depth`, only the first blocks and no output projection (what a captured layer costs).
    """
    d, h, g, k = cfg.d_model, cfg.num_heads, cfg.kv_heads, cfg.head_width
    projections = 2 * d * k * (2 * h + 2 * g)
    # Keys a query sees on average: half of the sequence, or nearly the window where it is short.
    window = min(cfg.window or seq_len, seq_len)
    attend = 2 * 2 * h * k * (window - window**2 / (2 * seq_len))
    block = projections + attend + 2 * 3 * d * cfg.d_ff
    if depth is not None:
        return int(depth * block)
    return int(cfg.num_layers * block + 2 * d * cfg.vocab_size)
