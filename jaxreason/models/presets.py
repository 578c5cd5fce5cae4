"""Named shapes, from a 1M tiny to 7B."""

from jaxreason.models.decoder import ModelConfig
from jaxreason.nn.rope import Llama3Scaling

PRESETS = {
    # Ours, for laptops and tests; the names give parameters without the embedding.
    "tiny_1m": ModelConfig(d_model=128, num_layers=5, num_heads=4, d_ff=344),
    "small_6m": ModelConfig(d_model=288, num_layers=6, num_heads=6, d_ff=768),
    "small_10m": ModelConfig(d_model=384, num_layers=6, num_heads=6, d_ff=1024),
    "bench_30m": ModelConfig(
        d_model=512, num_layers=8, num_heads=8, d_ff=1408, vocab_size=8192
    ),
    # HuggingFaceTB/SmolLM2-135M config.json.
    "smollm2_135m": ModelConfig(
        vocab_size=49152, d_model=576, num_layers=30, num_heads=9, num_kv_heads=3, d_ff=1536,
        rope_base=100_000.0, tie_embeddings=True,
    ),
    # HuggingFaceTB/SmolLM-135M config.json: the paper's best teacher for 1.4B.
    "smollm_135m": ModelConfig(
        vocab_size=49152, d_model=576, num_layers=30, num_heads=9, num_kv_heads=3, d_ff=1536,
        rope_base=10_000.0, tie_embeddings=True,
    ),
    # Qwen/Qwen2.5-0.5B and Qwen/Qwen3-0.6B config.json.
    "qwen2p5_500m": ModelConfig(
        vocab_size=151936, d_model=896, num_layers=24, num_heads=14, num_kv_heads=2, d_ff=4864,
        rope_base=1_000_000.0, norm_eps=1e-6, tie_embeddings=True, qkv_bias=True,
    ),
    "qwen3_600m": ModelConfig(
        vocab_size=151936, d_model=1024, num_layers=28, num_heads=16, num_kv_heads=8,
        head_dim=128, d_ff=3072, rope_base=1_000_000.0, norm_eps=1e-6, tie_embeddings=True,
        qk_norm=True,
    ),
    # meta-llama/Llama-3.2-1B config.json: the paper's teacher for 7B.
    "llama3p2_1b": ModelConfig(
        vocab_size=128256, d_model=2048, num_layers=16, num_heads=32, num_kv_heads=8,
        head_dim=64, d_ff=8192, rope_base=500_000.0, tie_embeddings=True,
        rope_scaling=Llama3Scaling(factor=32.0),
    ),
    # The LET paper says "LLaMA architecture, 1.4B"; this shape is reconstructed.
    "llama_1p4b": ModelConfig(d_model=2048, num_layers=24, num_heads=16, d_ff=5632),
    # meta-llama/Llama-2-7b config.json.
    "llama2_7b": ModelConfig(
        vocab_size=32000, d_model=4096, num_layers=32, num_heads=32, d_ff=11008
    ),
}  # fmt: skip
