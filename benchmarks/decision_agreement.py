"""How often generation skips the layers that training skipped, prompt by prompt, by precision.

    python -m benchmarks.decision_agreement --run=runs/first/docstrings-first-skip20-seed1

What is trained is what runs, up to rounding: in bfloat16 the training forward (packed rows,
adapters beside their weights) and generation (one prompt a row, adapters merged, other kernels)
round differently, and a layer whose statistic lies at the border of a decision may fall on the
other side. Both decide the held-out prompts of a finished run of `recipes.first`, each in a process
of its own with the compiler settings that it has for users. Needs no quiet machine.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys

from jaxreason.core import platform

SLOTS = 16


def held_out(run: pathlib.Path, dtype: str):
    """The run's config in a precision, its programs, and the checkpoint they go with."""
    from jaxreason import config as config_lib
    from jaxreason.recipes import first
    from jaxreason.train import load

    path = run / "config.json"
    cfg = config_lib.load(path.read_text(), [first.SkippingConfig], where=str(path))
    built = first.build(dataclasses.replace(cfg, compute_dtype=dtype))
    return built, load.find(path.parent, None)


def prompts_of(batch) -> list[tuple[int, int, list[int]]]:
    """(row, segment, tokens before the first learned one) of each prompt in a batch of rows."""
    import numpy as np

    from jaxreason.depth import segments

    where = segments.of_batch(batch)
    leading, ids = np.asarray(where.prompt), np.asarray(where.ids)
    tokens = np.asarray(batch["tokens"])
    return [
        (row, int(segment), tokens[row][leading[row] & (ids[row] == segment)].tolist())
        for row in range(len(ids))
        for segment in np.unique(ids[row][leading[row]])
    ]


def by_training(run: pathlib.Path, dtype: str, batches: int) -> list[dict]:
    """Prompts with the layers that the hard phase's forward runs for them."""
    import jax
    import numpy as np

    from jaxreason.core.mesh import use_mesh
    from jaxreason.recipes.first_phases import make_forward
    from jaxreason.recipes.open_model import load_group
    from jaxreason.train import manifest

    built, folder = held_out(run, dtype)
    meta, found = manifest.read_meta(folder), []
    with use_mesh(built.mesh):
        params = {
            group: load_group(folder, meta, specs, "float32", built.mesh, group)
            for group, specs in built.specs.items()
        }
        frozen = built.phases[-1].frozen.items()
        params |= {name: model.load() for name, model in frozen if model.apply is None}
        forward = make_forward(built.cfg, built.model, hard=True)
        gates = jax.jit(lambda params, batch: forward(params, batch).depth)
        for _, batch in list(built.held_out.iterate())[:batches]:
            keep = np.asarray(gates(params, built.put(batch)).keep)
            for row, segment, tokens in prompts_of(batch):
                layers = np.flatnonzero(keep[:, row, segment]).tolist()
                found.append({"prompt": tokens, "layers": layers})
    return found


def by_generation(run: pathlib.Path, dtype: str, prompts: list[list[int]]) -> list[list[int]]:
    """The layers that `generate` runs behind each prompt."""
    from jaxreason.recipes.open_model import open_model
    from jaxreason.rollout import GREEDY, generate, prepare

    model = prepare(open_model(run, dtype=dtype), SLOTS)
    done = generate(model, prompts, GREEDY, max_new_tokens=2, ignore_eos=True, slots=SLOTS)
    return [list(c.layers or ()) for c in done]


def compare(trained: list[dict], ran: list[list[int]]) -> dict:
    """How many prompts have one set on both sides, and in how many layers the others differ."""
    apart = [len(set(a["layers"]) ^ set(b)) // 2 for a, b in zip(trained, ran)]
    return {
        "prompts": len(trained),
        "sets": len({tuple(entry["layers"]) for entry in trained}),
        "same": sum(not n for n in apart),
        "most_layers_exchanged": max(apart),
    }


def main(argv: list[str] | None = None) -> None:
    """Measures each precision, one side after the other, and prints and writes what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=pathlib.Path, required=True)
    parser.add_argument("--batches", type=int, default=16, help="held-out batches that are decided")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--side", choices=["training", "generation"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side == "training":
        platform.prepare(restart=True)
        json.dump(by_training(args.run, args.dtypes, args.batches), sys.stdout)
        return
    if args.side == "generation":
        platform.prepare(restart=True, onednn=False)
        json.dump(by_generation(args.run, args.dtypes, json.load(sys.stdin)), sys.stdout)
        return
    if not (args.run / "config.json").exists():
        parser.error(f"--run={args.run}: no config.json there; expected a finished run's folder")

    def ask(side: str, dtype: str, given: object = None):
        command = [sys.executable, "-m", "benchmarks.decision_agreement", f"--run={args.run}"]
        command += [f"--side={side}", f"--dtypes={dtype}", f"--batches={args.batches}"]
        done = subprocess.run(command, input=json.dumps(given), stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        return json.loads(done.stdout)

    result: dict = {"run": args.run.name, "precisions": {}}
    for dtype in args.dtypes.split(","):
        trained = ask("training", dtype)
        ran = ask("generation", dtype, [entry["prompt"] for entry in trained])
        result["precisions"][dtype] = found = compare(trained, ran)
        print(f"{dtype}: {found}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
