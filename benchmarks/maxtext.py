"""Bytes a chip and compile time, beside MaxText's, for the same models on the same TPU slices.

    make maxtext                     # environment, this benchmark, docs/results/maxtext.json
    python -m benchmarks.maxtext [--cases=llama2_7b] [--only=ours]

Both sides run the same real TPU compiler (MaxText's package brings it; another version keeps
other temporaries), each in a process of its own: MaxText's `train_compile` with its defaults,
this project's `--compile_for`. Arguments are parameters, both moments and the batch; temporaries
are what the compiler keeps besides. `cpu_s` is the CPU time of the whole process, imports
included: wall time says little where other work runs.
"""

import argparse
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.maxtext_shapes import SEQ_LEN
from jaxreason.recipes.facts import commit

OUT = Path("docs/results/maxtext.json")
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: a model, a slice (by our name and by MaxText's), sequences a chip, remat."""

    preset: str
    slice: str
    chips: int
    maxtext_slice: str
    rows: int
    remat: str
    maxtext_remat: str

    @property
    def name(self) -> str:
        """The case's key in the results."""
        return f"{self.preset} {self.slice} {self.rows} a chip, remat {self.remat}"


V5P = ("v5p:2x4x4", 32, "v5p-64")
V5E = ("v5e:4x4", 16, "v5e-16")
CASES = (
    Case("llama2_7b", *V5P, 4, "full", "full"),
    Case("llama2_7b", *V5P, 16, "full", "full"),
    Case("llama2_7b", *V5P, 32, "full", "full"),
    Case("llama2_7b", *V5P, 4, "minimal", "minimal"),
    Case("llama_1p4b", *V5E, 4, "full", "full"),
    Case("llama_1p4b", *V5E, 8, "full", "full"),
    Case("llama_1p4b", *V5E, 1, "minimal", "minimal"),
)
# The shape of models/presets.py; MaxText has no such model, so its default one is given the sizes.
MAXTEXT_MODELS = {
    "llama2_7b": ["model_name=llama2-7b"],
    "llama_1p4b": [
        "base_emb_dim=2048", "base_num_query_heads=16", "base_num_kv_heads=16",
        "base_mlp_dim=5632", "base_num_decoder_layers=24", "head_dim=128", "vocab_size=49152",
    ],
}  # fmt: skip
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


def timed(command: list[str], cwd: Path) -> tuple[subprocess.CompletedProcess, dict]:
    """Runs a command; its wall time and the CPU time of its process."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # No compilation cache: a second run would measure nothing.
    env = os.environ | QUIET | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return done, {"wall_s": round(time.perf_counter() - begin, 1), "cpu_s": round(cpu, 1)}


def maxtext(python: str, case: Case) -> dict:
    """MaxText's numbers for a case."""
    show = "import maxtext, os; print(os.path.dirname(maxtext.__file__))"
    package = subprocess.run(
        [python, "-c", show], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            python, "-m", "maxtext.trainers.pre_train.train_compile",
            f"{package}/configs/base.yml", *MAXTEXT_MODELS[case.preset],
            f"compile_topology={case.maxtext_slice}", "compile_topology_num_slices=1",
            f"per_device_batch_size={case.rows}", f"max_target_length={SEQ_LEN}",
            f"remat_policy={case.maxtext_remat}", "run_name=compile",
            f"base_output_directory={folder}", "enable_checkpointing=false",
            "dataset_type=synthetic",
        ]  # fmt: skip
        done, times = timed(command, Path(folder))
    found = re.search(r"CompiledMemoryStats\((.*?)\)", done.stdout + done.stderr)
    if found is None:
        return failure(done) | times
    sizes = dict(re.findall(r"(\w+)_size_in_bytes=(\d+)", found[1]))
    return {"arguments": int(sizes["argument"]), "temporaries": int(sizes["temp"])} | times


def ours(python: str, case: Case) -> dict:
    """This project's numbers for a case."""
    shape = f"{case.preset},{case.chips},{case.rows},{case.remat}"
    command = [
        python, "-m", "jaxreason.main", f"--config=benchmarks/maxtext_shapes.py:{shape}",
        f"--compile_for=tpu:{case.slice}", "--json=-",
    ]  # fmt: skip
    done, times = timed(command, Path.cwd())
    if done.returncode:
        return failure(done) | times
    phase = json.loads(done.stdout)["phases"][0]
    memory = {name: int(phase["memory"][name]) for name in ("arguments", "temporaries")}
    return memory | {"compile_s": round(phase["seconds_compile"], 1)} | times


def failure(done: subprocess.CompletedProcess) -> dict:
    """A step that does not fit, which is a result; anything else that went wrong ends it all."""
    text = done.stdout + done.stderr
    if full := re.search(r"Ran out of memory.*|RESOURCE_EXHAUSTED.*|.*does not fit.*", text):
        return {"does_not_fit": full[0][:300]}
    sys.exit(f"error: exit code {done.returncode} of {' '.join(done.args)}\n{text[-3000:]}")


def version(python: str, package: str) -> str:
    """An installed package's version."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def table(results: dict) -> str:
    """The comparison in Markdown: GB a chip, and seconds of the whole process."""
    lines = [
        "| case | MaxText args | ours | MaxText temp | ours | MaxText s | ours | CPU s | ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, sides in results["cases"].items():
        row = [name]
        for key, unit in (("arguments", GB), ("temporaries", GB), ("wall_s", 1.0), ("cpu_s", 1.0)):
            for side in ("maxtext", "ours"):
                found, digits = sides.get(side), 3 if unit == GB else 0
                if found is None:
                    row.append("not run")
                else:
                    row.append(f"{found[key] / unit:.{digits}f}" if key in found else "no fit")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the cases that are asked for, and keeps the results of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maxtext", default=sys.executable, help="Python with maxtext[tpu]")
    parser.add_argument("--ours", default=sys.executable, help="Python with jaxreason[aot]")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--only", choices=["maxtext", "ours"], help="one side")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"cases": {}}
    sides = {"maxtext": (args.maxtext, maxtext), "ours": (args.ours, ours)}
    for case in CASES:
        if args.cases not in case.name:
            continue
        entry = results["cases"].setdefault(case.name, {})
        for side, (python, measure) in sides.items():
            if args.only in (None, side):
                packages = ("jax", "libtpu", "maxtext") if side == "maxtext" else ("jax", "libtpu")
                entry[side] = measure(python, case)
                entry[side]["versions"] = {name: version(python, name) for name in packages}
                entry[side]["commit"] = commit() if side == "ours" else None
                print(case.name, side, entry[side], flush=True)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
