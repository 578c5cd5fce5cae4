"""Generation's speed on this machine, side by side with transformers.generate.

    python -m benchmarks.generate_speed --torch=PYTHON --out=docs/results/generate_cpu.json

The same random weights of SmolLM2-135M's shape (float32, or with `--weights=bfloat16` such as
bfloat16 holds exactly, which our float32 reads at half the bytes), the same prompts, dtype and
threads, no end token; 64 tokens of prompt and 64 new ones. Each system runs in a process of its
own, in turn (A B C, A B C, ...), so that a machine whose speed drifts treats all alike; compiling
and warming up are not in the times and are stated apart. A call for one token is the prefill, the
rest of a whole call is decoding. `static` is transformers with a static cache and a compiled
forward. Run it alone.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from benchmarks.step import HERE, measure

# What the project promises: at least so many times the better of the two references.
PASS = {
    ("bfloat16", 1): 1.3,
    ("bfloat16", 8): 1.3,
    ("bfloat16", 32): 1.0,
    ("float32", 1): 1.5,
}
PARAMS, KV_VALUES = 134_515_008, 2 * 30 * 3 * 64  # Weights, and cached numbers a token.
OURS = "jaxreason"


def copy_bandwidth(threads: int, megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes a second, read and written, of the best of several copies larger than any cache."""
    size = megabytes * 1024 * 1024 // 8
    pairs = [(np.zeros(size), np.ones(size)) for _ in range(threads)]
    best = 0.0
    for _ in range(repeats):
        workers = [threading.Thread(target=np.copyto, args=pair) for pair in pairs]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, 2 * 8 * size * threads / (time.perf_counter() - start))
    return best


def summarise(rounds: list[dict], args) -> dict:
    """Medians over all rounds: tokens a second in all, in the prefill and in decoding."""
    out = {}
    for batch in rounds[0]["batches"]:
        every = lambda key, b=batch: [s for r in rounds for s in r["batches"][b][key]]  # noqa: E731
        whole, prefill = statistics.median(every("whole_s")), statistics.median(every("prefill_s"))
        out[int(batch)] = {
            "tokens_per_s": int(batch) * args.new / whole,
            "prefill_tokens_per_s": int(batch) * args.prompt / prefill,
            "decode_tokens_per_s": int(batch) * (args.new - 1) / (whole - prefill),
            "spread": [min(every("whole_s")), max(every("whole_s"))],
            # What the first call takes beyond a warm one: compiling, for whom does it.
            "compile_s": [r["batches"][batch]["first_s"][0] - whole for r in rounds],
        }
        if (held := rounds[0]["batches"][batch].get("weight_bytes")) is not None:
            out[int(batch)]["weight_bytes"] = held
    return out


def agreement(a: dict, b: dict) -> float:
    """The fraction of tokens, over all batch sizes, in which two systems' texts agree."""
    pairs = [
        (np.array(a["batches"][n]["tokens"]), np.array(b["batches"][n]["tokens"]))
        for n in a["batches"]
    ]
    return sum(int((x == y).sum()) for x, y in pairs) / sum(x.size for x, _ in pairs)


def compare(dtype: str, systems: dict[str, dict], bandwidth: float, args) -> dict:
    """Ratios to the better reference, and how near the memory's limit batch 1 is."""
    result: dict = {"systems": systems, "ratio": {}, "passes": {}}
    for batch in systems[OURS]:
        others = [s[batch]["tokens_per_s"] for name, s in systems.items() if name != OURS]
        if others:
            ratio = systems[OURS][batch]["tokens_per_s"] / max(others)
            result["ratio"][batch] = ratio
            if (need := PASS.get((dtype, batch))) is not None:
                result["passes"][batch] = ratio >= need
    if 1 in systems[OURS]:
        width = {"float32": 4, "bfloat16": 2}[dtype]
        held = args.prompt + args.new / 2
        moved = {
            name: s[1].get("weight_bytes", width * PARAMS) + width * KV_VALUES * held
            for name, s in systems.items()
        }
        result["bytes_a_token"] = moved
        result["fraction_of_bandwidth_limit"] = {
            name: s[1]["decode_tokens_per_s"] * moved[name] / bandwidth
            for name, s in systems.items()
        }
    return result


def show(dtype: str, found: dict) -> None:
    """Prints one dtype's table."""
    print(f"\n{dtype:20s} batch   tokens/s   prefill/s    decode/s   compile s")
    for name, rows in found["systems"].items():
        for batch, row in rows.items():
            print(
                f"{name:20s} {batch:5d} {row['tokens_per_s']:10.1f} "
                f"{row['prefill_tokens_per_s']:11.1f} {row['decode_tokens_per_s']:11.1f} "
                f"{row['compile_s'][0]:11.1f}"
            )
    for batch, ratio in found["ratio"].items():
        need = PASS.get((dtype, batch))
        verdict = "" if need is None else f" (at least {need}: {found['passes'][batch]})"
        print(f"batch {batch}: {ratio:.2f} times the better reference{verdict}")
    for name, part in found.get("fraction_of_bandwidth_limit", {}).items():
        print(f"{name}: {part:.0%} of the bandwidth limit at batch 1")


def main() -> None:
    """Prints tables and, with --out, writes every measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", required=True, help="a Python with torch and transformers")
    parser.add_argument("--model", default="", help="folder of the weights; made where absent")
    parser.add_argument("--weights", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--modes", default="default,static", help="of transformers; may be empty")
    parser.add_argument("--compile-mode", default="default", help="torch.compile's, for static")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="calls a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="", help="where to write the measurements as JSON")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, pathlib.Path(folder))
    for dtype, found in result["dtypes"].items():
        show(dtype, found)
    if args.out:
        out = pathlib.Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {out}")


def run(args, folder: pathlib.Path) -> dict:
    """Every round of every dtype and system."""
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"HF_HUB_OFFLINE": "1"}
    # A compilation cache of its own: the first round compiles, the others find what it left.
    ours_env = os.environ | {"JAXREASON_CACHE": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    script = str(HERE / "torch_generate.py")
    model = pathlib.Path(args.model or folder / "model")
    if not (model / "config.json").exists():
        subprocess.run(
            [args.torch, script, f"--model={model}", "--make", f"--weights={args.weights}"],
            check=True, env=clean,
        )  # fmt: skip
    sizes = [f"--{n}={getattr(args, n)}" for n in ("batches", "prompt", "new", "repeats")]
    load, bandwidths, found, versions = os.getloadavg()[0], [], {}, {}
    for dtype in args.dtypes.split(","):
        common = [f"--model={model}", f"--dtype={dtype}", *sizes]
        ours = [sys.executable, "-m", "benchmarks.generate_ours", *common]
        arms: dict[str, tuple[list[str], dict]] = {OURS: (ours, ours_env)}
        for mode in filter(None, args.modes.split(",")):
            command = [args.torch, script, f"--mode={mode}", f"--threads={args.threads}"]
            command += [f"--compile-mode={args.compile_mode}", *common]
            arms[f"transformers {mode}"] = (command, clean)
        rounds: dict[str, list[dict]] = {name: [] for name in arms}
        for i in range(args.rounds):
            bandwidths.append(copy_bandwidth(args.threads))
            for name, (command, env) in arms.items():
                rounds[name].append(measure(command, env))
                speeds = {
                    b: round(int(b) * args.new / statistics.median(r["whole_s"]), 1)
                    for b, r in rounds[name][-1]["batches"].items()
                }
                print(f"{dtype} round {i + 1} {name}: {speeds} tokens/s", flush=True)
        bandwidth = max(bandwidths)
        systems = {name: summarise(rows, args) for name, rows in rounds.items()}
        found[dtype] = compare(dtype, systems, bandwidth, args)
        found[dtype]["equal_tokens"] = {
            name: agreement(rounds[OURS][-1], rows[-1])
            for name, rows in rounds.items()
            if name != OURS
        }
        for rows in rounds.values():
            versions |= rows[-1]["versions"]
            for row in rows:
                for part in row["batches"].values():
                    del part["tokens"]
        found[dtype]["rounds"] = rounds
    return {
        "settings": {k: v for k, v in vars(args).items() if k not in ("torch", "model", "out")},
        "versions": versions,
        "commit": commit_of(),
        "load_at_start": load,
        "copy_bytes_per_s": bandwidths,
        "dtypes": found,
    }


def commit_of() -> str:
    """The commit that is measured."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE.parent
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
