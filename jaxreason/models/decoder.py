"""One decoder-only transformer: Llama, Qwen2, Qwen3, GPT-NeoX, OPT and OLMoE are its settings."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxreason.core import params as P
from jaxreason.core.mesh import shard
from jaxreason.core.outputs import Outputs
from jaxreason.core.params import ParamSpec
from jaxreason.models.model_config import ModelConfig
from jaxreason.nn import kv_cache, rope, stack
from jaxreason.nn.attention import attention, check_platform, choose_backend, make_mask
from jaxreason.nn.cached_attention import attend_to_cache
from jaxreason.nn.kernels import decode
from jaxreason.nn.layer_wrap import LayerWrap
from jaxreason.nn.linear import add_bias, linear, resolve_kernels
from jaxreason.nn.mlp import mlp, mlp_specs
from jaxreason.nn.moe import moe, moe_specs
from jaxreason.nn.norm import norm, norm_specs, rms_norm

__all__ = ["ModelConfig", "cast", "forward", "forward_flops", "init_cache", "logits"]
__all__ += ["resolve", "specs", "unstack"]


def specs(cfg: ModelConfig) -> dict[str, Any]:
    """The decoder's parameters.

    `embed` [V,E], `blocks` stacked over layers, `final_norm` and `unembed` [E,V] where the model
    has them, E the width of the embedding. Where E is not D: `embed_in` [E,D], `embed_out` [D,E].
    With learned positions: `positions` [P,D].
    """
    d, e, std = cfg.d_model, cfg.token_width, cfg.init_std
    out_std = std / math.sqrt(2 * cfg.num_layers)
    if cfg.moe is None:
        feed_forward = mlp_specs(cfg.mlp, d, cfg.d_ff, cfg.mlp_bias, std, out_std)
    else:
        feed_forward = moe_specs(cfg.moe, d, cfg.d_ff, std, out_std)
    block = {
        "attn_norm": norm_specs(cfg.norm, d),
        "attn": _attention_specs(cfg, out_std),
        "mlp_norm": norm_specs(cfg.norm, d),
        "mlp": feed_forward,
    }
    tree = {
        "embed": ParamSpec((cfg.vocab_size, e), ("vocab", "embed"), P.normal(std)),
        "blocks": P.stack(block, cfg.num_layers),
    }
    if cfg.positions == "learned":
        tree["positions"] = ParamSpec((cfg.max_positions, d), (None, "embed"), P.normal(std))
    if e != d:
        tree["embed_in"] = ParamSpec((e, d), (None, "embed"), P.normal(std))
        tree["embed_out"] = ParamSpec((d, e), ("embed", None), P.normal(std))
    if cfg.final_norm:
        tree["final_norm"] = norm_specs(cfg.norm, d)
    if not cfg.tie_embeddings:
        tree["unembed"] = ParamSpec((e, cfg.vocab_size), ("embed", "vocab"), P.normal(std))
    return tree


def _attention_specs(cfg: ModelConfig, out_std: float) -> dict[str, ParamSpec]:
    """`q` [D,H,K], `k` and `v` [D,G,K], `o` [H,K,D], and the biases and norms asked for."""
    d, h, g, k = cfg.d_model, cfg.num_heads, cfg.kv_heads, cfg.head_width
    of_heads = {"q": (h, "heads"), "k": (g, "kv_heads"), "v": (g, "kv_heads")}
    tree = {}
    for name, (n, axis) in of_heads.items():
        init = P.normal(cfg.init_std)
        tree[name] = ParamSpec((d, n, k), ("embed", axis, "head_dim"), init)
        if cfg.qkv_bias:
            tree[f"{name}_bias"] = ParamSpec((n, k), (axis, "head_dim"), P.zeros)
        if cfg.qk_norm and name != "v":
            each = ParamSpec((k,), ("head_dim",), P.ones)
            over_all = ParamSpec((n, k), (axis, "head_dim"), P.ones)
            tree[f"{name}_norm"] = each if cfg.qk_norm_scope == "head" else over_all
    tree["o"] = ParamSpec((h, k, d), ("heads", "head_dim", "embed"), P.normal(out_std))
    if cfg.out_bias:
        tree["o_bias"] = ParamSpec((d,), ("embed",), P.zeros)
    return tree


def init_cache(cfg: ModelConfig, batch: int, capacity: int, dtype) -> kv_cache.KVCache:
    """An empty key-value cache for `batch` rows of `capacity` tokens."""
    return kv_cache.make_cache(cfg.num_layers, batch, capacity, cfg.kv_heads, cfg.head_width, dtype)


def _heads(cfg: ModelConfig, p, y, rotary, name: str) -> jax.Array:
    """Queries, keys or values [B,T,heads,K] from their product `y`."""
    if cfg.qkv_bias:
        y = add_bias(y, p[f"{name}_bias"], cfg.kernels)
    if cfg.qk_norm and name != "v":
        y = _qk_norm(cfg, y, p[f"{name}_norm"])
    if cfg.clip_qkv is not None:
        y = jnp.clip(y, -cfg.clip_qkv, cfg.clip_qkv)
    if rotary is not None and name != "v":
        cos, sin = (t.reshape(-1, y.shape[1], 1, t.shape[-1]) for t in rotary)
        y = rope.apply_rope(y, cos, sin, cfg.kernels)
    return shard(y, "batch", "seq", "heads" if name == "q" else "kv_heads", None)


def _qk_norm(cfg: ModelConfig, y_bthk, scale) -> jax.Array:
    if cfg.qk_norm_scope == "head":
        return rms_norm(y_bthk, scale, cfg.norm_eps, cfg.kernels)
    flat = y_bthk.reshape(*y_bthk.shape[:2], -1)
    return rms_norm(flat, scale.reshape(-1), cfg.norm_eps, cfg.kernels).reshape(y_bthk.shape)


def _attention(cfg: ModelConfig, rotary, attend, p, x_btd, layer):
    """The attention's output [B,T,D], and what `attend` makes of the layer's cache."""
    if "qkv" in p:  # Joined for a token loop.
        joined = linear(x_btd, p["qkv"], cfg.kernels)
        products = decode.split_heads(joined, cfg.num_heads, cfg.kv_heads)
    else:
        products = [linear(x_btd, p[name], cfg.kernels) for name in ("q", "k", "v")]
    q, k, v = (_heads(cfg, p, y, rotary, name) for y, name in zip(products, ("q", "k", "v")))
    o, cache = attend(q, k, v, layer)
    o = linear(o, p["o"], cfg.kernels, inputs=2)
    return (add_bias(o, p["o_bias"], cfg.kernels) if cfg.out_bias else o), cache


def _feed_forward(cfg: ModelConfig, p, x_btd):
    """The feed-forward layer's output [B,T,D], and what a router did."""
    if cfg.moe is None:
        return mlp(cfg.mlp, p, x_btd, cfg.kernels), ()
    return moe(cfg.moe, p, x_btd, cfg.kernels)


def _block(cfg: ModelConfig, rotary, attend, p, x_btd: jax.Array, layer):
    """One block; `layer` holds its cache (or nothing). Returns (x, (new cache, router's aux))."""
    normed = lambda name, x: norm(cfg.norm, x, p[name], cfg.norm_eps, cfg.kernels)  # noqa: E731
    stream = lambda x: shard(x, "batch", "seq", "embed")  # noqa: E731
    before, after = normed, lambda name, x: x
    if cfg.norm_place == "post":
        before, after = after, before
    o, cache = _attention(cfg, rotary, attend, p["attn"], before("attn_norm", x_btd), layer)
    if cfg.parallel_residual:
        y, routed = _feed_forward(cfg, p["mlp"], normed("mlp_norm", x_btd))
        return stream(x_btd + o + y), (cache, routed)
    x_btd = stream(after("attn_norm", x_btd + o))
    y, routed = _feed_forward(cfg, p["mlp"], before("mlp_norm", x_btd))
    return stream(after("mlp_norm", x_btd + y)), (cache, routed)


def _wrapped(block, wrap: LayerWrap | None):
    """`block` as `wrap` runs it: `layer` holds (cache, extra), and aux what the wrap returned."""

    def wrapped(attend, p, x_btd, layer):
        def run(x_btd, cache):
            x_btd, (cache, routed) = block(attend, p, x_btd, cache)
            return x_btd, cache, routed

        if wrap is None:
            x_btd, cache, routed = run(x_btd, layer[0])
            return x_btd, (cache, routed, ())
        x_btd, cache, routed, aux = wrap.apply(run, x_btd, *layer)
        return x_btd, (cache, routed, aux)

    return wrapped


def _attend_to_batch(cfg: ModelConfig, window, positions, segments, dtype):
    mask = make_mask(
        q_positions=positions, kv_positions=positions, q_segments=segments, kv_segments=segments,
        window=window, backend=cfg.attention, dtype=dtype, in_row_order=True,
    )  # fmt: skip

    def attend(q, k, v, _):
        soft_cap, backend = cfg.attention_soft_cap, cfg.attention
        return attention(q, k, v, mask, soft_cap=soft_cap, backend=backend), ()

    return attend


def resolve(
    cfg: ModelConfig, platform: str | None = None, *, dtype=None, seq_len: int | None = None
) -> ModelConfig:
    """Replaces every `auto` by what it means on a platform (None: JAX's default).

    Attention depends on the compute `dtype` and on the length of the rows too, where they are known
    (see `nn.attention.choose_backend`). Raises UserError for a kernel of another platform.
    """
    kernels = resolve_kernels(cfg.kernels, platform)
    backend = choose_backend(
        platform or jax.default_backend(),
        head_width=cfg.head_width, soft_cap=cfg.attention_soft_cap, dtype=dtype, seq_len=seq_len,
    )  # fmt: skip
    auto = {
        "attention": "reference" if backend == "cpu" and kernels == "xla" else backend,
        "layers": "scan" if kernels == "xla" else "unroll",
    }
    changes = {name: value for name, value in auto.items() if getattr(cfg, name) == "auto"}
    resolved = dataclasses.replace(cfg, kernels=kernels, **changes)
    if platform is not None:
        check_platform(resolved.attention, platform)
    return resolved


def cast(params, dtype):
    """Matrices in the compute precision; norms, biases, routers and tables stay as they are.

    One cast a step: sharded parameters are then gathered in the compute precision. The gradient of
    a table sums over every occurrence of a token, that of a bias over all tokens, which in bfloat16
    stalls at 256 terms. A router's rounding would change which experts are chosen. What is laid out
    for a token loop stays too: it lies in what that loop computes with.
    """

    def one(path, leaf):
        if isinstance(leaf, decode.OutIn):
            return leaf
        names = P.path_name(path).split("/")
        kept = names[-1] in ("embed", "positions", "router") or names[-1].endswith("_bias")
        kept |= not jnp.issubdtype(leaf.dtype, jnp.floating)  # Such as the keys of a dropout.
        return leaf if kept or any(n.endswith("norm") for n in names) else leaf.astype(dtype)

    laid_out = lambda leaf: isinstance(leaf, decode.OutIn)  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, params, is_leaf=laid_out)


def unstack(params):
    """The parameters with `blocks` as a tuple of one tree a layer, which `forward` takes as well.

    A token loop unstacks once, outside: indexing the stacked arrays inside would copy them.
    """
    blocks = params["blocks"]
    if isinstance(blocks, tuple):
        return params
    layers = len(jax.tree.leaves(blocks)[0])
    return {**params, "blocks": tuple(stack.unstack(blocks, layers))}


def _embed(cfg: ModelConfig, params, batch, dtype) -> jax.Array:
    """The stream [B,T,D] that enters the first block."""
    if batch.get("inputs_embeds") is not None:
        x = batch["inputs_embeds"].astype(dtype)
    else:
        x = jnp.take(params["embed"], batch["tokens"], axis=0).astype(dtype)
    if cfg.token_width != cfg.d_model:
        x = linear(x, params["embed_in"], cfg.kernels)
    if cfg.positions == "learned":
        # A token beyond the table becomes NaN, so that a loss shows it; padding never does.
        at = jnp.where(batch["segment_ids"] > 0, batch["positions"], 0)
        x = x + jnp.take(params["positions"], at, axis=0).astype(dtype)
    return shard(x, "batch", "seq", "embed")


def _rotary_tables(cfg: ModelConfig, positions):
    """Cosines and sines for all layers, or None without RoPE."""
    if cfg.positions != "rope":
        return None
    freq = rope.frequencies(cfg.rotary_width, cfg.rope_base, cfg.rope_scaling)
    tables = rope.rope_tables(positions, freq)
    if cfg.kernels != "cpu":
        return tables
    # Once a step: XLA would take the cosines again in every layer. Flat, as a conditional around a
    # layer copies tables whose axes of one element it has put in another order.
    flat = [table.reshape(-1, table.shape[-1]) for table in tables]
    return jax.lax.optimization_barrier(flat)


def forward(
    params,
    cfg: ModelConfig,
    batch,
    *,
    dtype=jnp.float32,
    capture: tuple[int, ...] = (),
    cache: kv_cache.KVCache | kv_cache.BranchCache | None = None,
    cache_is_empty: bool = False,
    wrap: LayerWrap | None = None,
) -> Outputs:
    """Runs the decoder over `batch["tokens"]` [B,T] (or `inputs_embeds` [B,T,E]).

    `params["blocks"]` is stacked, or a tuple of one tree a layer (`unstack`). `positions` and
    `segment_ids` [B,T] belong to the batch. With `cache`, every row is one segment whose new tokens
    stand first (segment 1, then padding 0), positions continue from the cache's lengths, and the
    updated cache comes back in the outputs; `cache_is_empty` promises that it has no token yet,
    which makes reading a prompt cheaper. `capture` names residual streams to return: 0 what
    enters the first block, k after block k. `final` is what the unembedding reads, [B,T,E] behind
    OPT-350m's projection. With experts, `aux` has `router_logits` [L,B,T,n] and `experts`
    [L,B,T,k] of every layer. `wrap` runs in place of every block; what it returns is `depth`.
    """
    cfg = resolve(cfg, dtype=dtype, seq_len=batch["positions"].shape[1])
    params = cast(params, dtype)
    x = _embed(cfg, params, batch, dtype)
    block = _wrapped(functools.partial(_block, cfg, _rotary_tables(cfg, batch["positions"])), wrap)
    run = functools.partial(_run_cache, empty=cache_is_empty) if cache is not None else _run_batch
    extra = () if wrap is None else wrap.per_layer
    x, captured, routed, depth, cache = run(cfg, params, block, x, batch, capture, cache, extra)
    if cfg.final_norm:
        x = norm(cfg.norm, x, params["final_norm"], cfg.norm_eps, cfg.kernels)
    if cfg.token_width != cfg.d_model:
        x = linear(x, params["embed_out"], cfg.kernels)
    # Laid out for a token loop, a tied unembedding is there too.
    tied = cfg.tie_embeddings and "unembed" not in params
    unembed = params["embed"].T.astype(dtype) if tied else params["unembed"]
    aux = routed if cfg.moe is not None else None
    return Outputs(
        x, captured, unembed, cfg.logit_soft_cap, cfg.kernels, aux=aux, cache=cache,
        depth=None if wrap is None else depth,
    )  # fmt: skip


def _run_batch(cfg: ModelConfig, params, block, x, batch, capture, _, extra):
    """The blocks over whole rows, scanned or unrolled.

    Returns (x, captured, router's aux, wrap's aux, no cache).
    """
    positions, segments = batch["positions"], batch["segment_ids"]
    sizes = [n for _, n in cfg.spans]
    blocks = params["blocks"]
    if len(sizes) > 1 and cfg.layers == "unroll":
        blocks = unstack(params)["blocks"]
    runs = [
        (functools.partial(block, _attend_to_batch(cfg, window, positions, segments, x.dtype)), n)
        for window, n in cfg.spans
    ]
    x, captured, auxes = stack.run_stack(
        runs, stack.cut(blocks, sizes), x, [((), part) for part in stack.cut_stacked(extra, sizes)],
        capture=capture, mode=cfg.layers, remat=cfg.remat,
    )  # fmt: skip
    routed, depth = (_joined(jnp.concatenate, [aux[i] for aux in auxes]) for i in (1, 2))
    return x, captured, routed, depth, None


def _run_cache(cfg: ModelConfig, params, block, x, batch, capture, cache, extra, *, empty: bool):
    """The blocks over new tokens of a cache, unrolled.

    Returns (x, captured, router's aux, wrap's aux, new cache).
    """
    blocks, layers, routed, depth = unstack(params)["blocks"], [], [], []
    captured, written = {0: x} if 0 in capture else {}, None
    extras = stack.unstack(extra, cfg.num_layers)
    for window, n in cfg.spans:
        attend, written = attend_to_cache(
            cache, batch["positions"], batch["segment_ids"],
            window=window, soft_cap=cfg.attention_soft_cap, kernels=cfg.kernels, empty=empty,
        )  # fmt: skip
        for _ in range(n):
            i = len(layers)
            x, (layer, aux, own) = block(attend, blocks[i], x, (cache.layer(i), extras[i]))
            layers.append(layer)
            routed.append(aux)
            depth.append(own)
            if i + 1 in capture:
                captured[i + 1] = x
    cache = cache.replace_layers(layers).advance(written)
    return x, captured, _joined(jnp.stack, routed), _joined(jnp.stack, depth), cache


def _joined(join, parts):
    """Trees of arrays, joined leaf by leaf along the layer axis."""
    return jax.tree.map(lambda *leaves: join(leaves), *parts)


def logits(outputs: Outputs) -> jax.Array:
    """All logits [B,T,V] in float32; training uses them by chunks instead."""
    if isinstance(outputs.unembed, decode.OutIn):
        out = decode.product(outputs.final, outputs.unembed, jnp.float32)
    else:
        out = jnp.einsum(
            "btd,dv->btv", outputs.final, outputs.unembed, preferred_element_type=jnp.float32
        )
    cap = outputs.soft_cap
    return out if cap is None else cap * jnp.tanh(out / cap)


def forward_flops(cfg: ModelConfig, seq_len: int, *, depth: int | None = None) -> int:
    """FLOPs a token of one forward: 2 a multiply-add, causal attention counted at T/2.

    Of experts, those that a token is sent to. With `depth`, only the first blocks and no output
    projection (what a captured layer costs).
    """
    d, h, g, k = cfg.d_model, cfg.num_heads, cfg.kv_heads, cfg.head_width
    feed_forward = 2 * (3 if cfg.mlp == "swiglu" else 2) * d * cfg.d_ff
    if cfg.moe is not None:
        feed_forward = cfg.moe.top_k * feed_forward + 2 * d * cfg.moe.num_experts
    block = 2 * d * k * (2 * h + 2 * g) + feed_forward
    # Keys a query sees on average: half of the sequence, or nearly the window where it is short.
    windows = [min(window or seq_len, seq_len) for window, n in cfg.spans for _ in range(n)]
    keys = [window - window**2 / (2 * seq_len) for window in windows]
    project = 0 if cfg.token_width == d else 2 * d * cfg.token_width
    layers = cfg.num_layers if depth is None else depth
    total = project + layers * block + 2 * 2 * h * k * sum(keys[:layers])
    return int(
        total if depth is not None else total + project + 2 * cfg.token_width * cfg.vocab_size
    )
