"""Weak scaling by compilation: the same work a chip on more and more chips.

    python -m benchmarks.aot_scaling [--update]

The 1.4B next-token step with 16-way fsdp inside copies over data, on v5p slices of 16, 64, 256 and
512 chips, 4 rows of 2,048 tokens a chip. What leaves 5 % of the smallest slice is named, with the
reason: bytes of memory, and the collectives by which the bytes sent grow.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.aot_gates import _sent
from jaxreason.recipes.facts import commit
from jaxreason.train.aot_table import size

RESULTS = pathlib.Path("docs/results/aot_scaling.json")
SLICES = {16: "2x2x4", 64: "4x4x4", 256: "4x8x8", 512: "8x8x8"}
ROWS, FSDP, WITHIN = 4, 16, 0.05
WHY = {
    "over data+fsdp": "float32 tables of 403 MB (an embedding table's size) summed whole over all "
    "chips and cut afterwards: one with 4 copies of the model, two from 16 copies on",
    "over data": "the other gradients' parts, summed over the copies of the model",
    "over fsdp": "with one copy of the model the compiler makes chains of permutes, with several "
    "gathers, scatters and sums",
}


def compile_on(chips: int) -> dict[str, Any]:
    """The report of one slice."""
    command = [
        sys.executable, "-m", "jaxreason.main", "--config=experiments/let/llama_1p4b.py",
        "--config.method=NextToken", f"--config.data.batch_size={ROWS * chips}",
        f"--config.mesh.fsdp={FSDP}", "--config.mesh.data=-1",
        f"--compile_for=tpu:v5p:{SLICES[chips]}", "--json=-",
    ]  # fmt: skip
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{chips} chips: {done.stderr.strip()[-2000:]}")
    report = json.loads(done.stdout)
    phase = report["phases"][-1]
    memory = {name: phase["memory"][name] for name in ("arguments", "temporaries", "peak")}
    return {
        "versions": report["versions"],
        "mesh": report["mesh"],
        "batch_size": report["batch_size"],
        "memory": memory,
        "sent": _sent(phase),
        "compile_s": round(phase["seconds_compile"], 1),
    }


def grows(found: dict[int, dict[str, Any]]) -> list[str]:
    """What leaves the 5 % of the smallest slice, and why."""
    first, lines = found[min(found)], []
    for chips, one in found.items():
        for name, before in first["memory"].items():
            if abs(one["memory"][name] / before - 1) > WITHIN:
                lines.append(f"{chips} chips: {name} {one['memory'][name] / before - 1:+.1%}")
        total, now = sum(first["sent"].values()), sum(one["sent"].values())
        if abs(now / total - 1) <= WITHIN:
            continue
        lines.append(f"{chips} chips: bytes sent {now / total - 1:+.1%}")
        for name in sorted(one["sent"].keys() | first["sent"].keys()):
            change = one["sent"].get(name, 0.0) - first["sent"].get(name, 0.0)
            if abs(change) > 0.01 * total:
                why = next((f"; {why}" for key, why in WHY.items() if name.endswith(key)), "")
                lines.append(f"{chips} chips:   {name} {change / total:+.1%} of the sum{why}")
    return lines


def show(found: dict[int, dict[str, Any]], console: Console) -> None:
    """The table, a row a slice."""
    table = Table(title=f"1.4B, {ROWS} rows a chip, fsdp {FSDP}; compiled, not run",
                  title_justify="left", pad_edge=False)  # fmt: skip
    for column in ("chips", "arguments", "temporaries", "peak", "sent a chip", "over data"):
        table.add_column(column, justify="right")
    for chips, one in found.items():
        data = sum(sent for name, sent in one["sent"].items() if "data" in name)
        table.add_row(str(chips), *(size(v) for v in one["memory"].values()),
                      size(sum(one["sent"].values())), size(data))  # fmt: skip
    console.print(table)


def main() -> int:
    """Compiles on every slice and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help=f"write {RESULTS}")
    parser.add_argument("--chips", default=",".join(map(str, SLICES)), help="which slices")
    arguments = parser.parse_args()
    if arguments.update and arguments.chips != parser.get_default("chips"):
        parser.error("--update writes the whole table; leave --chips out")
    found = {int(n): compile_on(int(n)) for n in arguments.chips.split(",")}
    console = Console(width=max(120, Console().width))
    show(found, console)
    lines = grows(found)
    print("\n".join(lines) or "everything stays within 5 %")
    if arguments.update:
        table = {"commit": commit(), "slices": found, "grows": lines}
        RESULTS.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
