"""The training step's speed on this machine, side by side with PyTorch where one is named.

    make bench
    make bench ARGS="--torch=PYTHON --out=docs/results/step_cpu.json"

Each is run in a process of its own, in turn (A B A B ...), so that a machine whose speed drifts
treats both alike. The reference is Hugging Face's Llama under torch.compile with a fused AdamW:
`autocast` keeps float32 parameters as we do, `pure` holds parameters and moments in bfloat16.
Run it alone: both collapse when the cores are shared.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def measure(command: list[str], env: dict[str, str] | None = None) -> dict:
    """Runs a command whose last line of output is JSON."""
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parent, env=env, check=False
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Prints a table and, with --out, writes every measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="", help="a Python with torch and transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="", help="where to write the measurements as JSON")
    args = parser.parse_args()
    ours = [sys.executable, "-m", "benchmarks.step_ours"]
    arms: dict[str, tuple[list[str], dict[str, str] | None]] = {
        "jaxreason": (ours, None),
        "plain JAX": (
            [*ours, "--kernels=xla", "--layers=scan", "--steps=3", "--warmup=1"],
            {**os.environ, "JAXREASON_CPU_FLAGS": "0"},
        ),
    }
    if args.torch:
        clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        script = str(HERE / "torch_step.py")
        for mode in ("autocast", "pure"):
            arms[f"torch {mode}"] = ([args.torch, script, f"--mode={mode}"], clean)
    results: dict[str, list[dict]] = {name: [] for name in arms}
    for i in range(args.rounds):
        for name, (command, env) in arms.items():
            if name == "plain JAX" and i:
                continue  # Slow and not what is claimed: once is enough.
            results[name].append(measure(command, env))
            print(f"round {i + 1} {name}: {results[name][-1]['tokens_per_s_median']} tokens/s")
    speed = {
        name: statistics.median(r["tokens_per_s_median"] for r in rows)
        for name, rows in results.items()
    }
    print()
    for name, value in speed.items():
        ratio = speed["jaxreason"] / value
        print(f"{name:16s} {value:8.0f} tokens/s   jaxreason is {ratio:.2f} times as fast")
    if args.out:
        out = pathlib.Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"tokens_per_s": speed, "rounds": results}, indent=1) + "\n")
        print(f"written: {out}")


if __name__ == "__main__":
    main()
