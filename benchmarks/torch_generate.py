"""The reference of `benchmarks.generate_speed`: transformers.generate on SmolLM2-135M's shape.

Run by a Python of its own that has torch and transformers:

    PYTHON benchmarks/torch_generate.py --model=FOLDER --make     # random weights, float32
    PYTHON benchmarks/torch_generate.py --model=FOLDER --mode=static --dtype=bfloat16

The first writes the model that all systems load. The second prints one line of JSON: seconds of
whole calls of `generate`, and of calls for one token (that is the prefill), at each batch size.
`default` is what `generate` does unasked; `static` has a static cache and a forward compiled by
torch.compile, for which transformers must be told to compile on a CPU.
"""

import argparse
import json
import os
import pathlib
import time

import numpy as np
import torch
import transformers
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM


def make(folder: pathlib.Path, weights: str) -> None:
    """Writes a model of SmolLM2-135M's shape with random weights, scaled so that text varies.

    `weights` is the dtype that its file holds.
    """
    torch.manual_seed(0)
    cfg = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(cfg).to(getattr(torch, weights)).save_pretrained(folder)


def measure(model, tokens, args) -> dict:
    """Times one batch size, the first call of each kind apart."""
    # No end token, so that every row has its full length; attention sees every prompt token.
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    model.generation_config.eos_token_id = None
    if args.mode == "static":
        compile_config = CompileConfig(mode=args.compile_mode)
        compile_config._compile_all_devices = True
        settings |= {"cache_implementation": "static", "compile_config": compile_config}

    def call(new: int) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        out = model.generate(tokens, max_new_tokens=new, min_new_tokens=None, **settings)
        seconds = time.perf_counter() - start
        if out.shape[1] != tokens.shape[1] + new:
            raise SystemExit(f"generate gave {out.shape[1] - tokens.shape[1]} tokens, not {new}")
        return seconds, out

    # The static cache's size is a shape of the compiled program: the prefill runs in a cache of the
    # size that 2 tokens need, which is all that `generate` can be asked for.
    first = [call(args.new)[0] for _ in range(2)]
    call(1)
    prefill, whole, out = [], [], None
    for _ in range(args.repeats):
        prefill.append(call(1)[0])
        seconds, out = call(args.new)
        whole.append(seconds)
    assert out is not None
    return {
        "first_s": first,
        "prefill_s": prefill,
        "whole_s": whole,
        "tokens": out[:, tokens.shape[1] :].tolist(),
    }


def main() -> None:
    """Loads the model and measures every batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--mode", choices=["default", "static"], default="default")
    parser.add_argument("--compile-mode", default="default", help="torch.compile's mode")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.make:
        make(pathlib.Path(args.model), args.weights)
        return
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    result = {}
    for batch in map(int, args.batches.split(",")):
        # The same prompts as ours: numpy's generator is the same everywhere.
        prompts = np.random.default_rng(batch).integers(3, 49152, (batch, args.prompt))
        result[batch] = measure(model, torch.tensor(prompts), args)
        torch._dynamo.reset()  # A batch size of its own program, not one of unknown size for all.
    print(
        json.dumps(
            {
                "what": f"transformers {args.mode}",
                "dtype": args.dtype,
                "batches": result,
                "load": os.getloadavg()[0],
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
