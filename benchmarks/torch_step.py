"""The reference of `benchmarks.step`: Hugging Face's Llama, one training step under torch.compile.

Run by a Python of its own that has torch and transformers; prints one line of JSON. Modes:
`autocast` holds float32 parameters and moments and computes in bfloat16, `pure` holds everything
in bfloat16, `fp32` nothing. AdamW is fused, gradients are clipped to a global norm of 1.
"""

import argparse
import json
import os
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Compiles, warms up, times single steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=["autocast", "pure", "fp32"], default="autocast")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    cfg = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=1408,
        vocab_size=8192,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(cfg)
    if args.mode == "pure":
        model = model.to(torch.bfloat16)
    model.train()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = torch.randint(0, cfg.vocab_size, (args.batch, args.seq))

    def loss_of(tokens):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.mode == "autocast"):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    compiled = torch.compile(loss_of)

    def step() -> float:
        loss = compiled(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.item()

    for _ in range(args.warmup):
        step()
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    times.sort()
    count, median = args.batch * args.seq, times[len(times) // 2]
    print(
        json.dumps(
            {
                "what": "torch",
                "mode": args.mode,
                "params": sum(p.numel() for p in model.parameters()),
                "threads": torch.get_num_threads(),
                "step_s_min": round(times[0], 4),
                "step_s_median": round(median, 4),
                "tokens_per_s_median": round(count / median),
                "tokens_per_s_best": round(count / times[0]),
                "load": os.getloadavg()[0],
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
