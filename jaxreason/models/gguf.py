"""Models in GGUF files: Llama (SmolLM2, Mistral), Qwen2 and Qwen3, with their tokenizers."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.core.precision import resolve_dtype
from jaxreason.core.text import HfTokenizer
from jaxreason.models import hf_names, place
from jaxreason.models.byte_bpe import CUTS, parse_merges, tokenizer_json
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.gguf_file import Gguf, Tensor, open_gguf
from jaxreason.models.hf import Load, fill_params
from jaxreason.models.hf_fields import Fields
from jaxreason.models.hf_names import Row, Transform, flat, matrix, same
from jaxreason.models.hf_text import guarded
from jaxreason.models.model import Model
from jaxreason.nn.rope import LinearScaling, Llama3Scaling, frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_CONTROL, _USER_DEFINED = 3, 4


def _turned(transform: Transform) -> Transform:
    """Query and key rows as llama.cpp orders them for Llama: pairs beside each other."""

    def split(x: np.ndarray, shapes: list[hf_names.Shape]) -> list[np.ndarray]:
        heads, width = shapes[0][-2:]
        x = x.reshape(heads, width // 2, 2, *x.shape[1:]).swapaxes(1, 2)
        return transform.split(x.reshape(heads * width, *x.shape[3:]), shapes)

    return Transform(transform.shape, split, transform.join)


def _names(turn: bool) -> hf_names.Names:
    """The tensors of a file; Llama's queries and keys have their rows in another order."""
    weight, bias = (_turned(t) if turn else t for t in (matrix(), flat))
    rows = [
        Row("token_embd.weight", ("embed",), same),
        Row("output_norm.weight", ("final_norm",), flat),
    ]
    for ours, theirs in {
        "attn_norm": "attn_norm", "mlp_norm": "ffn_norm",
        "attn/q_norm": "attn_q_norm", "attn/k_norm": "attn_k_norm",
    }.items():  # fmt: skip
        rows.append(Row(f"blk.{{l}}.{theirs}.weight", (f"blocks/{ours}",), flat))
    for ours, theirs, w, b in (
        ("attn/q", "attn_q", weight, bias), ("attn/k", "attn_k", weight, bias),
        ("attn/v", "attn_v", matrix(), flat), ("attn/o", "attn_output", matrix(2), flat),
        ("mlp/gate", "ffn_gate", matrix(), flat), ("mlp/up", "ffn_up", matrix(), flat),
        ("mlp/down", "ffn_down", matrix(), flat),
    ):  # fmt: skip
        rows.append(Row(f"blk.{{l}}.{theirs}.weight", (f"blocks/{ours}",), w))
        rows.append(Row(f"blk.{{l}}.{theirs}.bias", (f"blocks/{ours}_bias",), b))
    return hf_names.Names("", tuple(rows), "output.weight", (), r"^rope_freqs\.weight$")


def load_gguf(
    path: str | os.PathLike, *, dtype: str = "auto", param_dtype: str = "float32", mesh=None
) -> Model:
    """Opens a .gguf file; quantised tensors become numbers, one at a time, on their way.

    Args:
      path: of the file.
      dtype: compute precision: auto, bfloat16 or float32.
      param_dtype: precision in which parameters are held, bfloat16 or float32.
      mesh: where the parameters live; None is the first device.

    Raises:
      UserError: the file is damaged, or has a model, a tokenizer or a type of tensor that is not
        supported.
    """
    model, load = inspect_gguf(path)
    params = load(param_dtype, mesh)
    return dataclasses.replace(model, params=params, dtype=resolve_dtype(dtype))


def inspect_gguf(path: str | os.PathLike) -> tuple[Model, Load]:
    """A file's model without its parameters, and what loads them; everything is checked here.

    Raises:
      UserError: as `load_gguf`.
    """
    file = Path(os.path.expanduser(path))
    opened = open_gguf(file)
    cfg, family = _config(opened, str(file))
    spots = _check(opened, cfg, family, str(file))
    tokenizer, files, bos_id, eos_ids = _tokenizer(opened, cfg.vocab_size, str(file))
    template = opened.fields.get("tokenizer.chat_template")

    def sources() -> Iterator[place.Source]:
        for spot, tensor in spots:

            def read(spot=spot, tensor=tensor) -> np.ndarray:
                return spot.row.transform.split(tensor.read(), spot.shapes)[0]

            yield spot.row.leaves[0], spot.index, read

    kinds = sorted({tensor.kind for tensor in opened.tensors.values()})
    context = opened.fields.get(f"{family}.context_length")
    model = Model(
        params=None,
        config=cfg,
        tokenizer=tokenizer,
        chat_template=template if isinstance(template, str) else None,
        eos_ids=eos_ids,
        bos_id=bos_id,
        name=file.stem,
        family=family,
        context=context if type(context) is int and 0 < context < 2**31 else None,
        files=files,
        source={"source": file.name, "format": "gguf", "stored": "+".join(kinds)},
    )
    return model, lambda param_dtype, mesh: fill_params(sources(), cfg, param_dtype, mesh)


def _config(opened: Gguf, where: str) -> tuple[ModelConfig, str]:
    family = opened.fields.get("general.architecture")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise UserError(
            f"{where}: the architecture is {str(family)[:40]!r}; supported in GGUF are "
            f"{', '.join(ARCHITECTURES)}; convert others from their Hugging Face folder"
        )
    own = {
        name.removeprefix(f"{family}."): value
        for name, value in opened.fields.items()
        if name.startswith(f"{family}.")
    }
    f = Fields(own, where)
    if (f.get("expert_count") or 0) != 0 or f.get("attention.sliding_window"):
        raise UserError(f"{where}: experts and sliding windows are not supported in GGUF")
    for name in ("attention.clamp_kqv", "logit_scale", "residual_scale", "embedding_scale"):
        if f.get(name):
            raise f.refuse(name, "none")
    heads, d_model = f.integer("attention.head_count"), f.integer("embedding_length")
    width = f.integer("attention.key_length", d_model // heads)
    if f.integer("attention.value_length", width) != width:
        raise f.refuse("attention.value_length", f"that of the keys, {width}")
    if f.integer("rope.dimension_count", width) != width:
        raise f.refuse("rope.dimension_count", f"the head's width, {width}")
    embed = opened.tensors.get("token_embd.weight")
    if embed is None:
        raise UserError(f"{where}: the tensor token_embd.weight is missing; get the file anew")
    base = f.number("rope.freq_base", 10_000.0)
    has = opened.tensors.__contains__
    cfg = ModelConfig(
        vocab_size=embed.shape[0],
        d_model=d_model,
        num_layers=f.integer("block_count"),
        num_heads=heads,
        num_kv_heads=f.integer("attention.head_count_kv", heads),
        head_dim=width,
        d_ff=f.integer("feed_forward_length"),
        rope_base=base,
        rope_scaling=_scaling(f, opened.tensors.get("rope_freqs.weight"), width, base),
        norm_eps=_single(f.number("attention.layer_norm_rms_epsilon")),
        tie_embeddings=not has("output.weight"),
        qkv_bias=has("blk.0.attn_q.bias"),
        out_bias=has("blk.0.attn_output.bias"),
        mlp_bias=has("blk.0.ffn_up.bias"),
        qk_norm=family == "qwen3",
    )
    try:
        cfg.validate()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return cfg, family


def _single(value: float) -> float:
    """A float32 of the metadata as the short decimal number that was meant."""
    return float(np.format_float_positional(np.float32(value), unique=True))


def _scaling(
    f: Fields, factors: Tensor | None, width: int, base: float
) -> LinearScaling | Llama3Scaling | None:
    kind = f.get("rope.scaling.type") or "none"
    if kind == "linear":
        return LinearScaling(factor=f.number("rope.scaling.factor"))
    if kind != "none":
        raise f.refuse("rope.scaling.type", "none or linear")
    if factors is None:
        return None
    # Llama 3's scaling is stored as divisors of the frequencies; its four numbers are not.
    if factors.shape != (width // 2,):
        raise f.refuse("rope.dimension_count", f"that of rope_freqs, {list(factors.shape)}")
    divisors = np.asarray(factors.read(), np.float64)
    for factor in (8.0, 32.0, 16.0, 4.0, 2.0):
        scaling = Llama3Scaling(factor=factor)
        expected = frequencies(width, base) / frequencies(width, base, scaling)
        if np.allclose(divisors, expected, rtol=1e-5):
            return scaling
    raise UserError("the rope_freqs of this GGUF are not those of Llama 3.1, 3.2 or 3.3")


def _check(
    opened: Gguf, cfg: ModelConfig, family: str, where: str
) -> list[tuple[hf_names.Place, Tensor]]:
    names = _names(turn=family == "llama")
    found, known = [], set()
    for spot in hf_names.places(cfg, names):
        tensor = opened.tensors.get(spot.name)
        if tensor is None:
            raise UserError(f"{where}: the tensor {spot.name} is missing; get the file anew")
        if tensor.shape != spot.shape:
            raise UserError(
                f"{where}: the tensor {spot.name} has shape {list(tensor.shape)}, the metadata "
                f"make it {list(spot.shape)}; get the file anew"
            )
        known.add(spot.name)
        found.append((spot, tensor))
    if extra := hf_names.unknown(opened.tensors, known, names):
        raise UserError(f"{where}: nothing reads the tensor {extra[0][:80]!r}")
    return found


def _tokenizer(
    opened: Gguf, vocab_size: int, where: str
) -> tuple[HfTokenizer, dict[str, bytes], int | None, tuple[int, ...]]:
    f = Fields(
        {k.removeprefix("tokenizer.ggml."): v for k, v in opened.fields.items()}, where
    )  # fmt: skip
    if f.get("model") != "gpt2":
        raise UserError(
            f"{where}: the tokenizer is {str(f.get('model'))[:40]!r}; supported in GGUF is gpt2 "
            "(byte-level BPE); convert the model from its Hugging Face folder"
        )
    tokens, kinds = f.get("tokens"), f.get("token_type")
    cut = str(f.get("pre") or "gpt-2")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise UserError(f"{where}: the metadata hold no list of tokens; get the file anew")
    if len(tokens) > vocab_size or len(set(tokens)) != len(tokens):
        raise UserError(
            f"{where}: {len(tokens)} tokens, {len(set(tokens))} of them different, for an "
            f"embedding of {vocab_size} rows; get the file anew"
        )
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise UserError(f"{where}: the metadata hold no kind for each token; get the file anew")
    merges = f.get("merges")
    if not isinstance(merges, list) or not all(isinstance(m, str) for m in merges):
        raise UserError(f"{where}: the metadata hold no list of merges; get the file anew")
    eos_id = f.integer("eos_token_id", least=0)
    bos_id = f.get("bos_token_id")
    ids = [i for i in (eos_id, f.get("eot_token_id")) if type(i) is int]
    if wrong := next((i for i in (*ids, bos_id or 0) if not 0 <= i < len(tokens)), None):
        raise UserError(f"{where}: there is no token {wrong}; expected less than {len(tokens)}")
    bos = None if type(bos_id) is not int else tokens[bos_id]
    adds_bos = f.flag("add_bos_token", CUTS.get(cut, {}).get("bos", False)) and bos is not None
    text = tokenizer_json(
        {token: i for i, token in enumerate(tokens)},
        parse_merges(merges, where),
        cut=cut,
        added={
            i: (token, kind == _CONTROL)
            for i, (token, kind) in enumerate(zip(tokens, kinds))
            if kind in (_CONTROL, _USER_DEFINED)
        },
        bos=bos if adds_bos else None,
        where=where,
    )
    named = {"eos": tokens[eos_id], "bos": bos, "parse_special": True, "name": where}
    tokenizer = guarded(where, lambda: HfTokenizer(text, **named))
    settings = {"eos_token": tokens[eos_id], "tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"bos_token": bos} if bos is not None else {}
    pad = f.get("padding_token_id")
    if type(pad) is int and 0 <= pad < len(tokens):
        settings["pad_token"] = tokens[pad]
    eos_ids = tuple(dict.fromkeys(ids))
    generation = {"eos_token_id": list(eos_ids) if len(eos_ids) > 1 else eos_id}
    generation |= {"bos_token_id": bos_id} if bos is not None else {}
    files = {
        "tokenizer.json": text.encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        "generation_config.json": (json.dumps(generation, indent=2) + "\n").encode(),
    }
    template = opened.fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return tokenizer, files, bos_id if adds_bos else None, eos_ids
