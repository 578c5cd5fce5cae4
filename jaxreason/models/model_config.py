"""The decoder's settings: the shape of a model, and what makes it a Llama, a Pythia or an OPT."""

import dataclasses
import math
from typing import Any, Literal

from jaxreason.core.errors import UserError
from jaxreason.nn.mlp import Mlp
from jaxreason.nn.moe import Moe
from jaxreason.nn.norm import Norm
from jaxreason.nn.rope import LinearScaling, Llama3Scaling

# Fields that say how a model is computed, and not what.
FORMS = ("kernels", "attention", "layers", "remat")


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
    """Width of the feed-forward layer, or of one expert."""
    embed_width: int = 0
    """Width of the embedding, projected to and from d_model (OPT-350m); 0 means d_model."""
    tie_embeddings: bool = False
    """Whether logits use the transposed embedding."""
    norm: Norm = "rms"
    """rms: RMSNorm; layer: LayerNorm with a bias (GPT-NeoX, OPT)."""
    norm_place: Literal["pre", "post"] = "pre"
    """pre: attention and feed-forward read the normalised stream; post: their sum with the stream
    is normalised (OPT-350m)."""
    norm_eps: float = 1e-5
    """Added to the mean square, or to the variance, in a norm."""
    final_norm: bool = True
    """Norm after the last block (OPT-350m: none)."""
    parallel_residual: bool = False
    """Attention and feed-forward read the same stream and are added at once (GPT-NeoX)."""
    mlp: Mlp = "swiglu"
    """Feed-forward layer: gated by SiLU, or one activation (gelu exact, gelu_tanh, relu)."""
    mlp_bias: bool = False
    """Bias on the feed-forward projections (GPT-NeoX, OPT)."""
    moe: Moe | None = None
    """Experts in place of the feed-forward layer (OLMoE)."""
    positions: Literal["rope", "learned"] = "rope"
    """rope rotates queries and keys; learned adds a table to the embedding (OPT)."""
    max_positions: int = 0
    """Rows of the learned table; 0 with rope."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: LinearScaling | Llama3Scaling | None = None
    """Context extension of the rotary frequencies."""
    rotary_fraction: float = 1.0
    """Leading fraction of a head's features that rotate (GPT-NeoX: 0.25)."""
    qkv_bias: bool = False
    """Bias on query, key and value projections (Qwen2, GPT-NeoX, OPT)."""
    out_bias: bool = False
    """Bias on the attention's output projection (GPT-NeoX, OPT)."""
    qk_norm: bool = False
    """RMSNorm of queries and keys before RoPE (Qwen3, OLMoE)."""
    qk_norm_scope: Literal["head", "all"] = "head"
    """head: each head by itself (Qwen3); all: over all heads' features (OLMoE)."""
    clip_qkv: float | None = None
    """Bounds queries, keys and values to [-clip, clip] before RoPE (OLMoE)."""
    window: int | None = None
    """Sliding attention window in tokens; None attends to the whole segment."""
    window_from: int = 0
    """First block, counted from 0, that has the window (Qwen2's max_window_layers)."""
    attention_soft_cap: float | None = None
    """Bounds attention logits by cap * tanh(logits / cap)."""
    logit_soft_cap: float | None = None
    """Bounds output logits the same way."""
    init_std: float = 0.02
    """Standard deviation of initial weights; output projections divide it by sqrt(2 * layers)."""
    kernels: Literal["auto", "xla", "cpu"] = "auto"
    """Forms of the parts: cpu are those that XLA's CPU compiler runs fast. auto: by the device."""
    attention: Literal["auto", "reference", "cpu", "blocked", "splash", "cudnn"] = "auto"
    """Attention backend: reference (the definition), cpu (XLA's CPU compiler), blocked (long rows,
    any device), splash (TPU), cudnn (GPU, half precision). auto: by device, precision and length.
    All honour segments and windows."""
    layers: Literal["auto", "scan", "unroll"] = "auto"
    """Scan compiles one layer; unroll runs faster on CPU. auto: by `kernels`."""
    remat: Literal["none", "full", "attention", "dots", "minimal", "minimal_attention"] = "none"
    """What the backward pass computes again: nothing; everything; all but attention; all but
    products; all but products with weights; all but these and attention. That attention is kept
    holds for splash and blocked; the other backends compute theirs again."""

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def token_width(self) -> int:
        """Width of a row of the embedding."""
        return self.embed_width or self.d_model

    @property
    def rotary_width(self) -> int:
        """Features of a head that rotate; 0 without RoPE."""
        return int(self.head_width * self.rotary_fraction) if self.positions == "rope" else 0

    @property
    def spans(self) -> tuple[tuple[int | None, int], ...]:
        """Runs of blocks with one attention window: (window or None, number of blocks)."""
        full = self.num_layers if self.window is None else self.window_from
        runs = ((None, full), (self.window, self.num_layers - full))
        return tuple(run for run in runs if run[1])

    def validate(self) -> None:
        """Raises UserError for settings that do not fit together."""
        for part in (self.moe, self.rope_scaling):
            if part is not None:
                part.validate()
        _check_sizes(self)
        _check_attention(self)
        _check_positions(self)
        if self.norm_place == "post" and self.parallel_residual:
            raise UserError(
                "model.parallel_residual needs norms in front; set model.norm_place to pre"
            )
        if self.moe is not None and (self.mlp != "swiglu" or self.mlp_bias):
            raise UserError(
                f"model.moe has SwiGLU experts without biases, model.mlp is {self.mlp} and "
                f"model.mlp_bias {self.mlp_bias}; set them to swiglu and False"
            )


def on_any_device(cfg: ModelConfig) -> ModelConfig:
    """The same model with the forms of its parts chosen anew where it runs."""
    return dataclasses.replace(cfg, **{name: "auto" for name in FORMS if name != "remat"})


def shape_of(cfg: ModelConfig) -> dict[str, Any]:
    """The settings that a checkpoint is known by, as plain values: all but the forms."""
    fields = dataclasses.asdict(cfg)
    if cfg.moe is not None:
        del fields["moe"]["form"], fields["moe"]["capacity_factor"]
    return {name: value for name, value in fields.items() if name not in FORMS}


def _check_sizes(cfg: ModelConfig) -> None:
    for name in ("d_model", "num_layers", "num_heads", "d_ff"):
        if getattr(cfg, name) < 1:
            raise UserError(f"model.{name} is {getattr(cfg, name)}; expected at least 1")
    for name in ("vocab_size", "num_kv_heads", "head_dim", "embed_width", "max_positions"):
        if getattr(cfg, name) < 0:
            raise UserError(f"model.{name} is {getattr(cfg, name)}; expected 0 or more")
    for name in ("norm_eps", "rope_base"):
        value = getattr(cfg, name)
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"model.{name} is {value}; expected a number above 0")
    for name in ("clip_qkv", "attention_soft_cap", "logit_soft_cap"):
        value = getattr(cfg, name)
        if value is not None and not value > 0:
            raise UserError(f"model.{name} is {value}; expected a number above 0, or None")


def _check_attention(cfg: ModelConfig) -> None:
    if not cfg.head_dim and cfg.d_model % cfg.num_heads:
        raise UserError(
            f"model.d_model {cfg.d_model} is not a multiple of model.num_heads "
            f"{cfg.num_heads}; change one of them or set model.head_dim"
        )
    if cfg.num_heads % cfg.kv_heads:
        raise UserError(
            f"model.num_heads {cfg.num_heads} is not a multiple of model.num_kv_heads "
            f"{cfg.kv_heads}; every key head serves the same number of query heads"
        )
    if cfg.qk_norm_scope != "head" and not cfg.qk_norm:
        raise UserError("model.qk_norm_scope is all without model.qk_norm; set it, or scope head")
    if cfg.window is not None and cfg.window < 1:
        raise UserError(f"model.window is {cfg.window}; expected at least 1 token, or None")
    if cfg.window_from and cfg.window is None:
        raise UserError(f"model.window_from is {cfg.window_from} without model.window; set both")
    if not 0 <= cfg.window_from <= cfg.num_layers:
        raise UserError(
            f"model.window_from is {cfg.window_from}; expected 0 to model.num_layers "
            f"{cfg.num_layers}"
        )
    if cfg.attention in ("cpu", "cudnn") and cfg.attention_soft_cap is not None:
        raise UserError(
            f"model.attention {cfg.attention} has no soft cap; set model.attention to blocked, or "
            "model.attention_soft_cap to None"
        )


def _check_positions(cfg: ModelConfig) -> None:
    if cfg.positions == "learned":
        if not cfg.max_positions:
            raise UserError("model.positions is learned; set model.max_positions to the table's")
        if cfg.rope_scaling is not None or cfg.rotary_fraction != 1.0:
            raise UserError(
                "model.positions is learned; leave model.rope_scaling and model.rotary_fraction "
                "as they are, they belong to rope"
            )
        return
    if cfg.max_positions:
        raise UserError(
            f"model.max_positions is {cfg.max_positions} with rope positions; set it to 0, or "
            "model.positions to learned"
        )
    if not 0 < cfg.rotary_fraction <= 1:
        raise UserError(
            f"model.rotary_fraction is {cfg.rotary_fraction}; expected above 0 and at most 1"
        )
    if cfg.rotary_width % 2 or not cfg.rotary_width:
        raise UserError(
            f"{cfg.rotary_width} of the {cfg.head_width} features of a head rotate; RoPE needs an "
            "even number: change model.head_dim or model.rotary_fraction"
        )
