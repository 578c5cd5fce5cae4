"""GGUF files: types against the definition of their blocks, rows, tokenizer, refusals."""

import struct

import gguf
import jax
import numpy as np
import pytest
import tiny_models
import tokenizers

from jaxreason.core.errors import UserError
from jaxreason.models.gguf import load_gguf
from jaxreason.models.gguf_file import QUANTISED, Tensor
from jaxreason.models.hf import load_hf, save_hf


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_model_is_what_its_types_hold(kind, tmp_path):
    kept = tiny_models.write_gguf(tmp_path / "m.gguf", kind)
    model = load_gguf(tmp_path / "m.gguf", dtype="float32")
    assert model.config.num_kv_heads == 2 and model.config.rope_base == 5000.0
    assert model.config.norm_eps == 1e-5 and not model.config.tie_embeddings
    save_hf(model, tmp_path / "hf")
    from jaxreason.models import safetensors_io

    written = safetensors_io.open_folder(tmp_path / "hf")
    assert written.keys() == kept.keys()
    for name, value in kept.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    again = load_hf(tmp_path / "hf", dtype="float32")
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params)):
        np.testing.assert_array_equal(a, b)


def half(data: bytes) -> float:
    return float(np.frombuffer(data, np.float16)[0])


def bits(data: bytes, width: int) -> list[int]:
    """The numbers of `width` bits in bytes, lowest bits first."""
    return [byte >> shift & (1 << width) - 1 for shift in range(0, 8, width) for byte in data]


def k_scales(data: bytes) -> tuple[list[int], list[int]]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K, from ggml's get_scale_min_k4."""
    scales, minima = [], []
    for j in range(8):
        if j < 4:
            scales.append(data[j] & 63)
            minima.append(data[j + 4] & 63)
        else:
            scales.append(data[j + 4] & 15 | data[j - 4] >> 6 << 4)
            minima.append(data[j + 4] >> 4 | data[j] >> 6 << 4)
    return scales, minima


def slow_q2_k(b: bytes) -> list[float]:
    scales, d, dmin = b[:16], half(b[80:82]), half(b[82:84])
    out = []
    for block in range(2):
        q = b[16 + 32 * block : 48 + 32 * block]
        for j in range(4):
            for i in range(32):
                scale = scales[8 * block + 2 * j + i // 16]
                out.append(d * (scale & 15) * (q[i] >> 2 * j & 3) - dmin * (scale >> 4))
    return out


def slow_q3_k(b: bytes) -> list[float]:
    high, low, packed, d = b[:32], b[32:96], b[96:108], half(b[108:110])
    scales = [
        (packed[i % 8] >> 4 * (i // 8) & 15 | (packed[8 + i % 4] >> 2 * (i // 4) & 3) << 4) - 32
        for i in range(16)
    ]
    out = []
    for block in range(2):
        for j in range(4):
            for i in range(32):
                q = low[32 * block + i] >> 2 * j & 3
                q -= 0 if high[i] >> 4 * block + j & 1 else 4
                out.append(d * scales[8 * block + 2 * j + i // 16] * q)
    return out


def slow_q4_k(b: bytes) -> list[float]:
    d, dmin = half(b[:2]), half(b[2:4])
    scales, minima = k_scales(b[4:16])
    out = []
    for j in range(8):
        for i in range(32):
            q = b[16 + 32 * (j // 2) + i] >> 4 * (j % 2) & 15
            out.append(d * scales[j] * q - dmin * minima[j])
    return out


def slow_q5_k(b: bytes) -> list[float]:
    d, dmin, high = half(b[:2]), half(b[2:4]), b[16:48]
    scales, minima = k_scales(b[4:16])
    out = []
    for j in range(8):
        for i in range(32):
            q = b[48 + 32 * (j // 2) + i] >> 4 * (j % 2) & 15 | (high[i] >> j & 1) << 4
            out.append(d * scales[j] * q - dmin * minima[j])
    return out


def slow_q6_k(b: bytes) -> list[float]:
    low, high, d = b[:128], b[128:192], half(b[208:210])
    scales = struct.unpack("16b", b[192:208])
    out = []
    for block in range(2):
        for j in range(4):
            for i in range(32):
                q = low[64 * block + 32 * (j % 2) + i] >> 4 * (j // 2) & 15
                q |= (high[32 * block + i] >> 2 * j & 3) << 4
                out.append(d * scales[8 * block + 2 * j + i // 16] * (q - 32))
    return out


def slow_legacy(b: bytes, kind: str) -> list[float]:
    d, at = half(b[:2]), 2
    low = half(b[2:4]) if kind.endswith("_1") else None
    at += 2 if low is not None else 0
    if kind == "Q8_0":
        return [d * q for q in struct.unpack("32b", b[2:])]
    five = kind.startswith("Q5")
    high = int.from_bytes(b[at : at + 4], "little") if five else 0
    q = bits(b[at + 4 if five else at :], 4)
    q = [value | (high >> i & 1) << 4 for i, value in enumerate(q)]
    return [d * v + low if low is not None else d * (v - (16 if five else 8)) for v in q]


SLOW = {
    "Q2_K": slow_q2_k, "Q3_K": slow_q3_k, "Q4_K": slow_q4_k, "Q5_K": slow_q5_k, "Q6_K": slow_q6_k
}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_dequantiser_against_the_definition(kind):
    """Random blocks, read by the package and by ggml's definition of the block written out."""
    rng = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, (6, size), np.uint8)
    where = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2))
    if kind in ("Q8_0", "Q4_0", "Q5_0"):
        where = (0,)
    for at in where:  # finite scales
        data[:, at : at + 2] = rng.normal(size=(6, 1)).astype(np.float16).view(np.uint8)
    got = Tensor("x", (6, block), kind, data.reshape(-1)).read()
    slow = SLOW.get(kind, lambda b: slow_legacy(b, kind))
    expected = [slow(row.tobytes()) for row in data]
    np.testing.assert_allclose(got, np.asarray(expected, np.float32), rtol=2e-6, atol=1e-5)


def test_the_tokenizer_is_that_of_its_vocabulary(tmp_path):
    tiny_models.write_gguf(tmp_path / "m.gguf")
    model = load_gguf(tmp_path / "m.gguf")
    theirs = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: i for i, token in enumerate(tiny_models.TOKENS)}, tiny_models.MERGES
        )
    )
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    theirs.add_special_tokens([token for token, _ in tiny_models.SPECIAL.values()])
    text = "the inner there a 1234 in<|im_start|>user\n ü 日本 \U0001f642\n\n  x<|im_end|>"
    assert model.tokenizer.encode(text) == theirs.encode(text).ids
    assert model.eos_ids == (2,) and model.bos_id is None
    assert model.chat_template == tiny_models.TEMPLATE and model.context == 64


def patched(path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def rename(old: bytes, new: bytes):
    """Another value of the same length."""
    return lambda data: data.replace(old, new)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00gemma"),
         "architecture is 'gemma'"),
        (rename(b"smollm", b"falcon"), "pre-tokenizer is 'falcon'"),
        (rename(b"gpt2", b"bert"), "tokenizer is 'bert'"),
        (rename(b"blk.1.ffn_up", b"blk.9.ffn_up"), "blk.1.ffn_up.weight is missing"),
        (rename(b"block_count\x04\x00\x00\x00\x02", b"block_count\x04\x00\x00\x00\x01"),
         "nothing reads"),
        (rename(b"GGUF", b"GGML"), "does not begin with GGUF"),
        (lambda data: data[:-40], "claims bytes"),
    ],
)  # fmt: skip
def test_refusals(change, said, tmp_path):
    tiny_models.write_gguf(tmp_path / "m.gguf")
    patched(tmp_path / "m.gguf", change)
    with pytest.raises(UserError, match=said) as error:
        load_gguf(tmp_path / "m.gguf")
    assert "\n" not in str(error.value)
