"""Named shapes, from a 1M tiny to 8B; released ones are those of their config.json."""

from jaxreason.models.model_config import ModelConfig
from jaxreason.nn.moe import Moe
from jaxreason.nn.rope import Llama3Scaling


def _smollm2(layers: int, width: int, heads: int, groups: int, d_ff: int, base: float):
    return ModelConfig(
        vocab_size=49152, d_model=width, num_layers=layers, num_heads=heads, num_kv_heads=groups,
        d_ff=d_ff, rope_base=base, tie_embeddings=True,
    )  # fmt: skip


def _llama3(
    layers: int, width: int, heads: int, d_ff: int, head_dim: int, factor: float, tied: bool
):
    return ModelConfig(
        vocab_size=128256, d_model=width, num_layers=layers, num_heads=heads, num_kv_heads=8,
        head_dim=head_dim, d_ff=d_ff, rope_base=500_000.0, tie_embeddings=tied,
        rope_scaling=Llama3Scaling(factor=factor) if factor > 1 else None,
    )  # fmt: skip


def _qwen2(layers: int, width: int, heads: int, groups: int, d_ff: int, vocab: int = 151936):
    return ModelConfig(
        vocab_size=vocab, d_model=width, num_layers=layers, num_heads=heads, num_kv_heads=groups,
        d_ff=d_ff, rope_base=1_000_000.0, norm_eps=1e-6, tie_embeddings=vocab == 151936,
        qkv_bias=True,
    )  # fmt: skip


def _qwen3(layers: int, width: int, heads: int, d_ff: int):
    return ModelConfig(
        vocab_size=151936, d_model=width, num_layers=layers, num_heads=heads, num_kv_heads=8,
        head_dim=128, d_ff=d_ff, rope_base=1_000_000.0, norm_eps=1e-6, tie_embeddings=True,
        qk_norm=True,
    )  # fmt: skip


def _pythia(layers: int, width: int, heads: int):
    return ModelConfig(
        vocab_size=50304, d_model=width, num_layers=layers, num_heads=heads, d_ff=4 * width,
        norm="layer", mlp="gelu", mlp_bias=True, qkv_bias=True, out_bias=True,
        rotary_fraction=0.25, parallel_residual=True,
    )  # fmt: skip


def _opt(layers: int, width: int, heads: int, embed_width: int = 0):
    # The 350m alone normalises behind the sum, has no final norm and a narrow embedding.
    return ModelConfig(
        vocab_size=50272, d_model=width, num_layers=layers, num_heads=heads, d_ff=4 * width,
        embed_width=embed_width, tie_embeddings=True, norm="layer",
        norm_place="post" if embed_width else "pre", final_norm=not embed_width,
        mlp="relu", mlp_bias=True, qkv_bias=True, out_bias=True,
        positions="learned", max_positions=2048,
    )  # fmt: skip


PRESETS = {
    # Ours, for laptops and tests; the names give parameters without the embedding.
    "tiny_1m": ModelConfig(d_model=128, num_layers=5, num_heads=4, d_ff=344),
    "small_6m": ModelConfig(d_model=288, num_layers=6, num_heads=6, d_ff=768),
    "small_10m": ModelConfig(d_model=384, num_layers=6, num_heads=6, d_ff=1024),
    "bench_30m": ModelConfig(
        d_model=512, num_layers=8, num_heads=8, d_ff=1408, vocab_size=8192
    ),
    # HuggingFaceTB/SmolLM-135M (the LET paper's best teacher for 1.4B) and SmolLM2.
    "smollm_135m": _smollm2(30, 576, 9, 3, 1536, 10_000.0),
    "smollm2_135m": _smollm2(30, 576, 9, 3, 1536, 100_000.0),
    "smollm2_360m": _smollm2(32, 960, 15, 5, 2560, 100_000.0),
    "smollm2_1p7b": _smollm2(24, 2048, 32, 32, 8192, 130_000.0),
    # Qwen/Qwen2.5 and Qwen/Qwen3; none of them uses its sliding window.
    "qwen2p5_500m": _qwen2(24, 896, 14, 2, 4864),
    "qwen2p5_1p5b": _qwen2(28, 1536, 12, 2, 8960),
    "qwen2p5_3b": _qwen2(36, 2048, 16, 2, 11008),
    "qwen2p5_7b": _qwen2(28, 3584, 28, 4, 18944, vocab=152064),
    "qwen3_600m": _qwen3(28, 1024, 16, 3072),
    "qwen3_1p7b": _qwen3(28, 2048, 16, 6144),
    "qwen3_4b": _qwen3(36, 2560, 32, 9728),
    # EleutherAI/pythia; the deduped ones have the same shapes.
    "pythia_14m": _pythia(6, 128, 4),
    "pythia_70m": _pythia(6, 512, 8),
    "pythia_160m": _pythia(12, 768, 12),
    "pythia_410m": _pythia(24, 1024, 16),
    "pythia_1b": _pythia(16, 2048, 8),
    "pythia_1p4b": _pythia(24, 2048, 16),
    # facebook/opt.
    "opt_125m": _opt(12, 768, 12),
    "opt_350m": _opt(24, 1024, 16, embed_width=512),
    "opt_1p3b": _opt(24, 2048, 32),
    # allenai/OLMoE-1B-7B-0924.
    "olmoe_1b_7b": ModelConfig(
        vocab_size=50304, d_model=2048, num_layers=16, num_heads=16, d_ff=1024,
        qk_norm=True, qk_norm_scope="all", moe=Moe(num_experts=64, top_k=8),
    ),
    # meta-llama; Llama-3.2-1B is the LET paper's teacher for 7B.
    "llama3p2_1b": _llama3(16, 2048, 32, 8192, 64, 32.0, tied=True),
    "llama3p2_3b": _llama3(28, 3072, 24, 8192, 128, 32.0, tied=True),
    "llama3_8b": _llama3(32, 4096, 32, 14336, 128, 1.0, tied=False),
    "llama3p1_8b": _llama3(32, 4096, 32, 14336, 128, 8.0, tied=False),
    "llama2_7b": ModelConfig(
        vocab_size=32000, d_model=4096, num_layers=32, num_heads=32, d_ff=11008
    ),
    # The LET paper says "LLaMA architecture, 1.4B"; this shape is reconstructed.
    "llama_1p4b": ModelConfig(d_model=2048, num_layers=24, num_heads=16, d_ff=5632),
}  # fmt: skip
