"""Compiles the shipped large configs for the slices they are meant for, and holds their budgets.

    python -m benchmarks.aot_gates                  all gates; prints the table
    python -m benchmarks.aot_gates --only=NAME,...  some of them
    python -m benchmarks.aot_gates --update         writes docs/results/aot_gates.json anew
    python -m benchmarks.aot_gates --table          the committed table, compiling nothing

A gate fails where a step does not fit, needs 2 % more bytes than was committed, or transfers by a
kind of collective that was not there. After the teacher's phase its bytes must be gone. Needs
jaxreason[aot], for GPUs jaxreason[cuda] too; no TPU and no GPU.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxreason.core.errors import nearest
from jaxreason.recipes.facts import commit
from jaxreason.train.aot_table import size

RESULTS = pathlib.Path("docs/results/aot_gates.json")
TOLERANCE = 1.02
# Below this many bytes a chip a collective is a handful of scalars and norms.
SMALL = 1e6
MEMORY = ("arguments", "temporaries", "output", "peak")


@dataclasses.dataclass(frozen=True)
class Gate:
    """A config, the slice that it is compiled for, and settings that make it fit."""

    name: str
    config: str
    target: str
    settings: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """What a user would type, behind `python -m jaxreason.main`."""
        changes = [f"--config.{setting}" for setting in self.settings]
        return [f"--config={self.config}", *changes, f"--compile_for={self.target}"]


LET_1P4B, LET_7B = "experiments/let/llama_1p4b.py", "experiments/let/llama_7b.py"
# A gather over all three dimensions of a torus becomes a sum of twice its bytes, which is not
# overlapped with anything; over two of them it stays a gather. So fsdp has two, data the third.
GATES = (
    Gate("let_1p4b_v5e_4x4", LET_1P4B, "tpu:v5e:4x4", ("train.accumulate=2",)),
    Gate("let_1p4b_v5p_2x2x4", LET_1P4B, "tpu:v5p:2x2x4"),
    Gate("let_1p4b_h100_8", LET_1P4B, "gpu:h100:8"),
    Gate("let_7b_v5p_4x4x4", LET_7B, "tpu:v5p:4x4x4", ("mesh.data=4", "mesh.fsdp=16")),
)


def compile_gate(gate: Gate) -> dict[str, Any]:
    """The report of a gate; its `failed` is the last line of a command that ended in an error."""
    command = [sys.executable, "-m", "jaxreason.main", *gate.command, "--json=-"]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "COLUMNS": "120"}
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode not in (0, 3):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": lines[-1]}
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return json.loads(done.stdout) | {"seconds": round(time.perf_counter() - begin, 1)}


def budget(report: dict[str, Any], at: str) -> dict[str, Any]:
    """What of a report is committed; `at` is the commit that it is of."""
    return {
        "target": report["target"],
        "versions": report["versions"],
        "commit": at,
        "mesh": report["mesh"],
        "batch_size": report["batch_size"],
        "accumulate": report["accumulate"],
        "remat": report["remat"],
        "attention": report["attention"],
        "teacher_bytes": report["teacher_bytes"],
        "seconds": report["seconds"],
        "phases": {phase["phase"]: _phase(phase) for phase in report["phases"]},
    }


def _phase(phase: dict[str, Any]) -> dict[str, Any]:
    bound = phase["bound"]
    return {
        "memory": {name: int(phase["memory"][name]) for name in (*MEMORY, "limit")},
        "collectives": {name: int(sent) for name, sent in _sent(phase).items()},
        "flops": phase["flops"],
        "bound": {
            "step_s": round(bound["step"], 4),
            "limited_by": bound["limited_by"],
            "tokens_per_s": round(bound["tokens_per_s"]),
            "mfu": round(bound["mfu"], 3),
        },
        "compile_s": round(phase["seconds_lower"] + phase["seconds_compile"], 1),
    }


def _sent(phase: dict[str, Any]) -> dict[str, float]:
    """Bytes that a chip sends, by kind of collective and axes."""
    total: dict[str, float] = {}
    for found in phase["collectives"]:
        name = f"{found['kind']} over {'+'.join(found['axes'])}"
        total[name] = total.get(name, 0.0) + found["sent"]
    return total


def complaints(report: dict[str, Any], committed: dict[str, Any] | None) -> list[str]:
    """What has grown beyond the committed budget, one line each; none where the gate holds."""
    if "failed" in report:
        return [report["failed"]]
    lines = []
    for phase in report["phases"]:
        name = phase["phase"]
        if phase["out_of_memory"] is not None:
            over = phase["out_of_memory"]
            needed = f"{size(over['needed'])} of {size(over['limit'])}"
            lines.append(f"phase {name} does not fit: {needed}")
            continue
        lines += [f"phase {name}: {line}" for line in _grown(phase, committed)]
    return lines + _teacher_stays(report)


def _grown(phase: dict[str, Any], committed: dict[str, Any] | None) -> list[str]:
    if committed is None:
        return ["no committed budget; write it with --update"]
    known = committed["phases"].get(phase["phase"])
    if known is None:
        return ["a phase that is not committed; write it with --update"]
    lines, sent = [], _sent(phase)
    pairs = {f"{n} bytes": (phase["memory"][n], known["memory"][n]) for n in MEMORY}
    for name, now in sent.items():
        if name in known["collectives"]:
            pairs[f"{name} bytes sent"] = (now, known["collectives"][name])
        elif now > SMALL:
            lines.append(f"a new collective: {name}, {size(now)} a chip")
    for name, (now, before) in pairs.items():
        if now > max(before * TOLERANCE, before + SMALL):
            lines.append(
                f"{name} grew from {size(before)} to {size(now)} ({now / max(before, 1) - 1:+.0%})"
            )
    return lines


def _teacher_stays(report: dict[str, Any]) -> list[str]:
    """The teacher's bytes must leave the arguments with its phase (padded: somewhat more do)."""
    phases = [phase for phase in report["phases"] if phase["memory"] is not None]
    if len(phases) < 2 or not report["teacher_bytes"]:
        return []
    left = phases[0]["memory"]["arguments"] - phases[-1]["memory"]["arguments"]
    if left >= report["teacher_bytes"] / TOLERANCE:
        return []
    return [
        f"the teacher's {size(report['teacher_bytes'])} do not leave the arguments with its phase: "
        f"they fall by {size(left)}"
    ]


def show(budgets: dict[str, Any], console: Console) -> None:
    """The table of every gate and phase."""
    table = Table(title="compiled, not run; a chip, a step", title_justify="left", pad_edge=False)
    for column in (
        "gate", "phase", "arguments", "temporaries", "peak", "of", "sent", "bound: step",
        "limited by", "tokens/s", "MFU", "compile",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("gate", "phase") else "right")
    for name, gate in budgets.items():
        for phase, found in gate["phases"].items():
            memory, bound = found["memory"], found["bound"]
            table.add_row(
                name, phase, *(size(memory[m]) for m in ("arguments", "temporaries", "peak")),
                size(memory["limit"]), size(sum(found["collectives"].values())),
                f"{bound['step_s']:.2f} s", bound["limited_by"], f"{bound['tokens_per_s']:,}",
                f"{bound['mfu']:.0%}", f"{found['compile_s']:.0f} s",
            )  # fmt: skip
            name = ""
    console.print(table)
    console.print(
        "Step, tokens/s (all chips) and MFU are bounds from the chips' peaks.", style="dim"
    )


def main() -> int:
    """Runs the gates; 1 where one does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="names of gates, with commas")
    parser.add_argument("--update", action="store_true", help="commit what is found")
    parser.add_argument("--table", action="store_true", help="print the committed table")
    arguments = parser.parse_args()
    committed = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    console = Console(width=max(150, Console().width))
    names = [name for name in arguments.only.split(",") if name]
    known = [gate.name for gate in GATES]
    for name in names:
        if name not in known:
            print(f"error: no gate {name!r}{nearest(name, known)}; gates: {', '.join(known)}")
            return 2
    if arguments.table:
        show(committed, console)
        return 0
    failed, found, at = 0, {}, commit()  # Before the results file is touched.
    for gate in GATES:
        if names and gate.name not in names:
            continue
        print(f"{gate.name}: python -m jaxreason.main {' '.join(gate.command)}", flush=True)
        report = compile_gate(gate)
        usable = "failed" not in report and not any(p["out_of_memory"] for p in report["phases"])
        before = committed.get(gate.name)
        if arguments.update and usable:
            before = budget(report, at)
            committed = {g.name: {**committed, gate.name: before}[g.name] for g in GATES
                         if g.name in {*committed, gate.name}}  # fmt: skip
            RESULTS.write_text(json.dumps(committed, indent=1) + "\n")
        lines = complaints(report, before)
        for line in lines:
            print(f"{gate.name}: {line}", flush=True)
        if usable and before and report["versions"] != before["versions"]:
            print(f"{gate.name}: committed with {before['versions']}, this is {report['versions']}")
        failed += bool(lines)
        if usable:
            found[gate.name] = budget(report, at)
    show(found, console)
    print(f"{len(found)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
