"""Hugging Face's config.json as a ModelConfig, and back.

Every field that changes a family's numbers is honoured or refused by one line; what is absent has
the default of `transformers`. Both the fields of transformers 4 (`rope_theta`, `rope_scaling`) and
of transformers 5 (`rope_parameters`) are read; version 4's are written, which both read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxreason.core.errors import UserError, nearest
from jaxreason.models.hf_fields import Fields, rope
from jaxreason.models.model_config import FORMS, ModelConfig
from jaxreason.nn.rope import LinearScaling, Llama3Scaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "opt": "OPTForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}
_PLAIN_MLP = {  # name of the activation -> ours; the first name of each of ours is written
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
# Fields that say where and how a model runs, and not what its numbers are.
FREE = (*FORMS, "init_std")
"""Fields that a model's weights and outputs do not depend on."""


def from_hf(config: Mapping[str, Any], where: str = "config.json") -> tuple[ModelConfig, str]:
    """The shape and the family (`model_type`) of a model's config.json.

    Raises:
      UserError: another family, a missing or unfit field, or a setting that is not supported.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        hint = nearest(str(family)[:40], ARCHITECTURES)
        raise UserError(
            f"{where}: model_type is {str(family)[:40]!r}; expected one of "
            f"{', '.join(ARCHITECTURES)}{hint}"
        )
    f = Fields(config, where)
    if f.get("quantization_config") is not None:
        raise UserError(
            f"{where}: the weights are quantised (quantization_config); give the unquantised "
            "model, or a GGUF file"
        )
    if f.get("rope_interleaved"):
        raise f.refuse("rope_interleaved", "false")
    cfg = _READERS[family](f)
    try:
        cfg.validate()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return cfg, family


def _shape(f: Fields, width: str = "intermediate_size") -> dict[str, Any]:
    return {
        "vocab_size": f.integer("vocab_size"),
        "d_model": f.integer("hidden_size"),
        "num_layers": f.integer("num_hidden_layers"),
        "num_heads": f.integer("num_attention_heads"),
        "d_ff": f.integer(width),
    }


def _rms(f: Fields, *, eps: float = 1e-6, groups: int = 0, **extra: Any) -> ModelConfig:
    """The fields that Llama and its relatives share; `groups` is their default of key heads."""
    f.choice("hidden_act", ("silu", "swish"), "silu")
    base, scaling, fraction = rope(f)
    if fraction != 1.0:
        raise f.refuse("partial_rotary_factor", "1.0 in this family")
    shape = _shape(f)
    common = {
        "num_kv_heads": f.optional_integer("num_key_value_heads", groups) or shape["num_heads"],
        "head_dim": f.integer("head_dim", 0),
        "norm_eps": f.number("rms_norm_eps", eps),
        "tie_embeddings": f.flag("tie_word_embeddings", False),
        "rope_base": base,
        "rope_scaling": scaling,
    }
    return _make(**shape, **(common | extra))


def _llama(f: Fields) -> ModelConfig:
    bias = f.flag("attention_bias", False)
    return _rms(f, qkv_bias=bias, out_bias=bias, mlp_bias=f.flag("mlp_bias", False))


def _mistral(f: Fields) -> ModelConfig:
    window = f.optional_integer("sliding_window", 4096)
    return _rms(f, groups=8, window=window)


def _qwen(f: Fields, **extra: Any) -> ModelConfig:
    window = None
    layers = f.integer("num_hidden_layers")
    first = f.integer("max_window_layers", 28, least=0)
    if f.flag("use_sliding_window", False):
        window = f.optional_integer("sliding_window", 4096)
    types = f.get("layer_types")
    if types is not None:
        first = _first_window(f, types, layers)
        if first < layers and window is None:
            raise f.refuse("layer_types", "full_attention without use_sliding_window")
    if window is None or first >= layers:
        window, first = None, 0
    return _rms(f, groups=32, window=window, window_from=first, **extra)


def _first_window(f: Fields, types: Any, layers: int) -> int:
    if not isinstance(types, list) or len(types) != layers:
        raise f.refuse("layer_types", f"a list of {layers} names")
    first = next((i for i, t in enumerate(types) if t != "full_attention"), layers)
    if any(t != "sliding_attention" for t in types[first:]):
        raise f.refuse("layer_types", "full_attention, then sliding_attention to the end")
    return first


def _qwen2(f: Fields) -> ModelConfig:
    return _qwen(f, qkv_bias=True)


def _qwen3(f: Fields) -> ModelConfig:
    bias = f.flag("attention_bias", False)
    head_dim = f.integer("head_dim", 128)
    return _qwen(f, qk_norm=True, qkv_bias=bias, out_bias=bias, head_dim=head_dim)


def _olmoe(f: Fields) -> ModelConfig:
    from jaxreason.nn.moe import Moe

    if f.get("sliding_window") is not None:
        raise f.refuse("sliding_window", "null in this family")
    bias = f.flag("attention_bias", False)
    moe = Moe(
        num_experts=f.integer("num_experts", 64),
        top_k=f.integer("num_experts_per_tok", 8),
        normalise_top_k=f.flag("norm_topk_prob", False),
    )
    return _rms(
        f, eps=1e-5, qk_norm=True, qk_norm_scope="all", moe=moe, qkv_bias=bias, out_bias=bias,
        clip_qkv=f.optional_number("clip_qkv"),
    )  # fmt: skip


def _gpt_neox(f: Fields) -> ModelConfig:
    act = f.choice("hidden_act", _PLAIN_MLP, "gelu")
    base, scaling, fraction = rope(f, base="rotary_emb_base", fraction="rotary_pct", part=0.25)
    bias = f.flag("attention_bias", True)
    return _make(
        **_shape(f),
        norm="layer",
        norm_eps=f.number("layer_norm_eps", 1e-5),
        mlp=_PLAIN_MLP[act],
        mlp_bias=True,
        qkv_bias=bias,
        out_bias=bias,
        rope_base=base,
        rope_scaling=scaling,
        rotary_fraction=fraction,
        parallel_residual=f.flag("use_parallel_residual", True),
        tie_embeddings=f.flag("tie_word_embeddings", False),
    )


def _opt(f: Fields) -> ModelConfig:
    act = f.choice("activation_function", _PLAIN_MLP, "relu")
    if not f.flag("layer_norm_elementwise_affine", True):
        raise f.refuse("layer_norm_elementwise_affine", "true")
    shape = _shape(f, "ffn_dim")
    bias, before = f.flag("enable_bias", True), f.flag("do_layer_norm_before", True)
    width = f.integer("word_embed_proj_dim", shape["d_model"]) or shape["d_model"]
    return _make(
        **shape,
        norm="layer",
        norm_place="pre" if before else "post",
        mlp=_PLAIN_MLP[act],
        mlp_bias=bias,
        qkv_bias=bias,
        out_bias=bias,
        positions="learned",
        max_positions=f.integer("max_position_embeddings", 2048),
        embed_width=0 if width == shape["d_model"] else width,
        final_norm=before and not f.flag("_remove_final_layer_norm", False),
        tie_embeddings=f.flag("tie_word_embeddings", True),
    )


_READERS = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "olmoe": _olmoe,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
}


def _make(**fields: Any) -> ModelConfig:
    return ModelConfig(**fields)


def to_hf(cfg: ModelConfig, family: str) -> dict[str, Any]:
    """The config.json of a model of this shape in a family.

    Raises:
      UserError: the family has no such model; the line names the first field in which it differs.
    """
    out = _write(cfg, family)
    differing = _differences(cfg, out)
    if family == "llama" and cfg.d_model % cfg.num_heads:
        differing = differing or ["head_dim"]  # transformers 5 refuses it for Llama alone
    if differing:
        name = differing[0]
        raise UserError(
            f"model.{name} is {getattr(cfg, name)!r}, which no {family} model of Hugging Face has; "
            "keep the model as a checkpoint of this program"
        )
    return out


def family_of(cfg: ModelConfig) -> str:
    """The first family that has a model of this shape; UserError where none has."""
    best: tuple[int, UserError] | None = None
    for family in ARCHITECTURES:
        try:
            to_hf(cfg, family)
        except UserError as error:
            count = len(_differences(cfg, _write(cfg, family)))
            if best is None or count < best[0]:
                best = (count, error)
            continue
        return family
    assert best is not None
    raise best[1]


def _differences(cfg: ModelConfig, out: dict[str, Any]) -> list[str]:
    back, _ = from_hf(out)
    ours, theirs = plain(cfg), plain(back)
    return [name for name, value in ours.items() if theirs[name] != value]


def plain(cfg: ModelConfig) -> dict[str, Any]:
    """The fields that decide numbers, each meaning spelt in one way."""
    cfg = dataclasses.replace(cfg, num_kv_heads=cfg.kv_heads, head_dim=cfg.head_width)
    if cfg.embed_width == cfg.d_model:
        cfg = dataclasses.replace(cfg, embed_width=0)
    if cfg.window is None or cfg.window_from >= cfg.num_layers:
        cfg = dataclasses.replace(cfg, window=None, window_from=0)
    if cfg.positions == "learned":
        no_rope = {"rope_base": 0.0, "rope_scaling": None, "rotary_fraction": 1.0}
        cfg = dataclasses.replace(cfg, **no_rope)
    else:
        cfg = dataclasses.replace(cfg, max_positions=0)
    if not cfg.qk_norm:
        cfg = dataclasses.replace(cfg, qk_norm_scope="head")
    if cfg.moe is not None:  # Its losses are the training's, not the model's.
        kept = ("num_experts", "top_k", "normalise_top_k")
        moe = type(cfg.moe)(**{name: getattr(cfg.moe, name) for name in kept})
        cfg = dataclasses.replace(cfg, moe=moe)
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    return {name: value for name, value in fields.items() if name not in FREE}


def _write(cfg: ModelConfig, family: str) -> dict[str, Any]:
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init_std,
    }
    activation = next((name for name, ours in _PLAIN_MLP.items() if ours == cfg.mlp), "gelu")
    if family == "opt":
        return out | {
            "ffn_dim": cfg.d_ff,
            "word_embed_proj_dim": cfg.embed_width or cfg.d_model,
            "do_layer_norm_before": cfg.norm_place == "pre",
            "_remove_final_layer_norm": cfg.norm_place == "pre" and not cfg.final_norm,
            "activation_function": activation,
            "enable_bias": cfg.qkv_bias,
            "max_position_embeddings": cfg.max_positions or 2048,
            "init_std": cfg.init_std,
            "dropout": 0.0,
        }
    out["intermediate_size"] = cfg.d_ff
    scaling = cfg.rope_scaling
    match scaling:
        case LinearScaling():
            out["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
        case Llama3Scaling():
            out["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            }
    if family == "gpt_neox":
        return out | {
            "layer_norm_eps": cfg.norm_eps,
            "hidden_act": activation,
            "rotary_emb_base": cfg.rope_base,
            "rotary_pct": cfg.rotary_fraction,
            "use_parallel_residual": cfg.parallel_residual,
            "attention_bias": cfg.qkv_bias,
        }
    out |= {
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_width,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": "silu",
        "rope_theta": cfg.rope_base,
    }
    if family in ("llama", "qwen3", "olmoe"):
        out["attention_bias"] = cfg.qkv_bias
    if family == "llama":
        out["mlp_bias"] = cfg.mlp_bias
    if family == "mistral":
        out["sliding_window"] = cfg.window
    if family in ("qwen2", "qwen3"):
        out |= {
            "use_sliding_window": cfg.window is not None,
            "sliding_window": cfg.window,
            "max_window_layers": cfg.window_from if cfg.window else cfg.num_layers,
        }
    if family == "olmoe" and cfg.moe is not None:
        out |= {
            "num_experts": cfg.moe.num_experts,
            "num_experts_per_tok": cfg.moe.top_k,
            "norm_topk_prob": cfg.moe.normalise_top_k,
            "clip_qkv": cfg.clip_qkv,
        }
    return out
