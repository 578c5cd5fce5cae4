"""Compiles a run's steps for a TPU or GPU that is not here, and reports what they will need.

The config is that of a run of any recipe; data, devices, and the files of a teacher or of a base
(where the config tells its shape) are not needed. The phases, the steps and the shardings are the
very ones of the run: both call the recipe's `describe`.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath
from jax.experimental import topologies
from rich.console import Console

from jaxreason.core.chips import Target, parse_target
from jaxreason.core.errors import UserError
from jaxreason.core.mesh import batch_shards, use_mesh
from jaxreason.recipes import recipes
from jaxreason.recipes.program import Program
from jaxreason.train import aot, aot_table
from jaxreason.train.aot import Compiled
from jaxreason.train.manifest import atomic_write

EXIT_OUT_OF_MEMORY = 3
SPECS = Path(__file__).parent.parent / "core" / "gpu_specs"


def devices_of(target: Target) -> Sequence[Any]:
    """The devices of hardware that is not here, for a mesh to compile on.

    Raises:
      UserError: its compiler is not installed, or does not know the shape.
    """
    shape = "x".join(map(str, target.shape))
    if target.chip.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"--compile_for={target.text} needs the TPU compiler, libtpu, which is not "
                "installed; pip install 'jaxreason[aot]' (no TPU is needed)"
            )
        name, platform, options = f"{target.chip.name}:{shape}", "tpu", {}
    else:
        if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
            raise UserError(
                f"--compile_for={target.text} needs the GPU compiler, jax[cuda13], which is not "
                "installed; pip install 'jaxreason[cuda]' (no GPU is needed)"
            )
        spec = SPECS / f"{target.chip.name}.txtpb"
        if not spec.exists():
            known = ", ".join(sorted(path.stem for path in SPECS.glob("*.txtpb")))
            raise UserError(
                f"--compile_for={target.text}: no description of this GPU for the compiler; "
                f"those there are: {known}"
            )
        nodes = max(1, target.shape[0] // target.chip.host)
        name, platform = f"{target.chip.name}_{shape}", "cuda"
        layout = f"1x{nodes}x{target.shape[0] // nodes}"
        options = {"target_config": spec.read_text(), "topology": layout}
    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except Exception as error:  # The plugin raises what it likes, over several lines.
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--compile_for={target.text}: the compiler does not make this shape ({reason}); "
            "choose one of the chip's slices"
        ) from error


def program_for(cfg: Any, devices: Sequence[Any]) -> Program:
    """The programs of a recipe's config on devices that need not be here; reads no data."""
    return recipes()[type(cfg)].program_for(cfg, devices)


def compile_phases(cfg: Any, target: Target) -> tuple[Program, list[Compiled]]:
    """Compiles the step of every phase for a target."""
    program = program_for(cfg, devices_of(target))
    with use_mesh(program.mesh):
        found = [
            aot.compile_step(
                phase.name,
                program.step_fn(phase),
                program.arguments(phase),
                aot.Work(
                    flops=program.flops(phase),
                    traffic=program.traffic(phase),
                    tokens=program.tokens,
                ),
                target,
                program.mesh,
            )
            for phase in program.phases
        ]
    return program, found


def report(program: Program, target: Target, phases: Sequence[Compiled]) -> dict[str, Any]:
    """The whole report as plain values."""
    cfg = program.cfg
    packages = ["jax", "jaxlib", "libtpu" if target.chip.platform == "tpu" else "jax-cuda13-plugin"]
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "target": target.text,
        "chips": program.mesh.size,
        "chip": dataclasses.asdict(target.chip),
        "mesh": dict(program.mesh.shape),
        "versions": versions,
        "batch_size": cfg.data.batch_size,
        "seq_len": cfg.data.seq_len,
        "accumulate": cfg.train.accumulate,
        "remat": program.model.remat,
        "attention": program.model.attention,
        "compute_dtype": cfg.compute_dtype,
        "teacher_bytes": program.teacher_bytes,
        "bound": aot_table.NOTE,
        "phases": [aot.to_json(phase) for phase in phases],
    }


def advice(program: Program) -> list[str]:
    """What to change where a step does not fit, as command-line arguments, the cheapest first."""
    cfg, mesh, lines = program.cfg, program.mesh, []
    rows = batch_shards(mesh)
    each = cfg.data.batch_size // (rows * cfg.train.accumulate)
    if program.model.remat != "full":
        lines.append("--config.model.remat=full: activations are computed again, not kept")
    if each > 1:
        lines.append(
            f"--config.train.accumulate={cfg.train.accumulate * 2}: {each} rows a chip become "
            f"{each // 2 or 1} at a time, the same gradient"
        )
    if mesh.shape["data"] > 1:
        lines.append(
            f"--config.mesh.data=1 --config.mesh.fsdp={rows}: parameters and moments are cut "
            f"{rows} ways instead of {mesh.shape['fsdp']}"
        )
    if each > 1:
        lines.append(f"--config.data.batch_size={cfg.data.batch_size // 2}: another batch")
    lines.append("more chips: parameters, moments and rows are spread over all of them")
    return lines


def run(cfg: Any, where: str, *, json_path: str = "") -> int:
    """Compiles, prints the report, and returns the exit code: 0, or 3 where a step does not fit."""
    target = parse_target(where)
    program, phases = compile_phases(cfg, target)
    text = json.dumps(report(program, target, phases), indent=1) + "\n"
    console = Console(stderr=json_path == "-")
    title = f"{cfg.run.title or 'this config'} on {target.text}, {program.mesh.size} devices"
    aot_table.print_report(console, title, target, phases)
    failed = [phase for phase in phases if phase.out_of_memory is not None]
    for phase in failed:
        assert phase.out_of_memory is not None
        aot_table.print_out_of_memory(console, phase.phase, phase.out_of_memory, advice(program))
    if json_path == "-":
        sys.stdout.write(text)
    elif json_path:
        _write(Path(json_path), text)
    return EXIT_OUT_OF_MEMORY if failed else 0


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(epath.Path(path), text)
    except OSError as error:
        raise UserError(f"--json={path}: {error.strerror}; choose another file") from error
