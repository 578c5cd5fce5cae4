"""The memory that loading a Hugging Face folder needs beside the parameters it loads.

    python -m benchmarks.load_memory [--out=docs/results/load_memory.json]

Makes a random Llama of more than 2 GB in several shards in a temporary folder, once in float32 and
once in bfloat16, then loads each in a fresh process: a thread samples RssAnon of
/proc/self/status. The number that counts is (peak of RssAnon - bytes of the live parameters) over
the bytes of the largest tensor as stored, Python and JAX included; 1.2 is the most it may be.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LIMIT = 1.2
LLAMA = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True,
    "vocab_size": 128256,
}  # fmt: skip
# As many layers as 2 GB take in each precision; Llama 3's vocabulary makes the largest tensor.
MODELS = {
    "float32": LLAMA | {"num_hidden_layers": 26},
    "bfloat16": LLAMA | {"num_hidden_layers": 60},
}


def make(folder: Path, config: dict, dtype: str, shard_bytes: int = 600 << 20) -> dict:
    """Writes a model of random weights; returns its size on disk, shards and largest tensor."""
    import numpy as np

    from jaxreason.models import hf_names, safetensors_io
    from jaxreason.models.hf_config import from_hf

    cfg, family = from_hf(config)
    rng = np.random.default_rng(0)
    tensors = [
        (spot.name, spot.shape, lambda shape=spot.shape: rng.random(shape, np.float32))
        for spot in hf_names.places(cfg, hf_names.FAMILIES[family])
    ]
    safetensors_io.write_folder(folder, tensors, dtype, shard_bytes)
    (folder / "config.json").write_text(json.dumps(config))
    width = 4 if dtype == "float32" else 2
    sizes = [width * int(np.prod(shape)) for _, shape, _ in tensors]
    return {
        "stored_bytes": sum(sizes),
        "shards": len(list(folder.glob("*.safetensors"))),
        "largest_tensor_bytes": max(sizes),
    }


def anonymous() -> int:
    """RssAnon of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def measure(folder: str, param_dtype: str) -> dict:
    """Loads a folder in this process and samples its anonymous memory."""
    import jax
    import jax.numpy as jnp

    from jaxreason.models.hf import load_hf

    jax.block_until_ready(jnp.zeros(8) + 1)  # XLA and its threads are not the load's.
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load_hf(folder, dtype="float32", param_dtype=param_dtype)
    jax.block_until_ready(model.params)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    live = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    return {"before_bytes": before, "peak_bytes": peak, "live_bytes": live, "seconds": seconds}


def run() -> list[dict]:
    """Both stored precisions, held as float32, and bfloat16 held as it is."""
    rows = []
    for stored, config in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            facts = make(Path(folder), config, stored)
            for held in ("float32",) if stored == "float32" else ("float32", "bfloat16"):
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.load_memory",
                    "--measure",
                    folder,
                    held,
                ]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found = json.loads(out.splitlines()[-1])
                largest = facts["largest_tensor_bytes"]
                extra = found["peak_bytes"] - found["live_bytes"]
                alone = extra - found["before_bytes"]
                rows.append(
                    {"stored": stored, "held": held, **facts, **found}
                    | {
                        "extra_over_largest": round(extra / largest, 3),
                        "without_python_and_jax": round(alone / largest, 3),
                        "limit": LIMIT,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main(argv: list[str]) -> int:
    """Measures, or is the fresh process of a measurement."""
    if argv[:1] == ["--measure"]:
        print(json.dumps(measure(*argv[1:])))
        return 0
    import importlib.metadata
    import platform

    rows = run()
    out = next((arg.partition("=")[2] for arg in argv if arg.startswith("--out=")), "")
    if out:
        versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "numpy")}
        result = {"python": platform.python_version(), **versions, "rows": rows}
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["extra_over_largest"] <= LIMIT for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
