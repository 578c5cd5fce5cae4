"""Runs the arms of LET's table, any number at a time, and sums them up in one JSON file.

    python -m benchmarks.let_table --stage=tune       # every arm's settings on the tuning seed
    python -m benchmarks.let_table --stage=main       # five arms, three seeds
    python -m benchmarks.let_table --stage=annealed   # LET with 50 to 87.5 % of the steps
    python -m benchmarks.let_table --stage=summary    # docs/results/let_stdlib.json

A run that is on record (docs/results/let_stdlib_runs.json) is not run again; one that was killed
goes on. Runs go in pairs, each on a core of its own (`--jobs`): 11,800 tokens/s together against
11,000 for one run on both cores. Every arm gets the same number of tuning runs on a seed that the
table does not use; `main` takes each arm's best.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from jaxreason.train.runs import load_run

TUNING_SEED = 100
SEEDS = (1, 2, 3)
FRACTIONS = (0.5, 0.625, 0.75, 0.875)
STEPS = 640
ROOT = pathlib.Path("runs/let")
RECORDS = pathlib.Path("docs/results/let_stdlib_runs.json")
OUT = pathlib.Path("docs/results/let_stdlib.json")
# Four runs an arm. The learning rate is the baseline's choice, and every arm uses it. A method's
# runs have half the steps; the baseline's have all, which favours the baseline.
TUNING = {
    "baseline": [{"optim.learning_rate": r} for r in (2.5e-4, 5e-4, 1e-3, 2e-3)],
    "let": [
        {"method.lambda_0": 0.3},
        {"method.lambda_0": 1.0},
        {"method.lambda_0": 0.3, "method.stop_fraction": 1.0},
        {"method.lambda_0": 0.3, "method.student_layer": 2},
    ],
    "distill": [{"method.weight": v} for v in (0.3, 0.5, 0.7, 0.9)],
    "salt": [
        {"method.weight": 0.5},
        {"method.weight": 0.8},
        {"method.weight": 0.5, "method.stop_fraction": 0.75},
        {"method.weight": 0.8, "method.stop_fraction": 0.75},
    ],
    "l2l": [
        {"method.lambda_0": 0.3},
        {"method.lambda_0": 1.0},
        {"method.lambda_0": 0.3, "method.stop_fraction": 1.0},
        {"method.lambda_0": 0.1},
    ],
}
FACTS = ("commit", "version", "python", "jax", "jaxlib", "device", "corpus_sha256")
# Two-sided 95 % points of Student's t, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: its folder's name, its arm and seed, and the fields that differ."""

    name: str
    arm: str
    seed: int
    changes: tuple[tuple[str, object], ...] = ()

    def command(self) -> list[str]:
        """The command line of the run."""
        changes = {"run.dir": str(ROOT / self.name), **dict(self.changes)}
        flags = [f"--config.{field}={value}" for field, value in changes.items()]
        config = f"--config=experiments/let/stdlib.py:{self.arm},seed={self.seed}"
        return [sys.executable, "-m", "jaxreason.main", config, *flags]


def records() -> dict[str, dict]:
    """The complete runs on record, by the name of their folder, which holds their settings."""
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def harvest() -> None:
    """Puts the finished runs' numbers on record; a report is what a run writes last."""
    known = records()
    for path in sorted(ROOT.glob("*/report.html")):
        data = load_run(path.parent)
        last = [row for row in data.rows if row["kind"] == "eval"][-1]
        known[data.name] = {
            "loss": last["loss"],
            "bits_per_byte": last["bits_per_byte"],
            "steps": last["step"],
            "tokens": data.tokens,
            "flops": data.flops,
            "flops_without_teacher": data.last_step * data.facts["flops_per_step"],
            "wall_s": data.wall_time_s,
            "params_non_embedding": data.facts["params_non_embedding"],
            "curve": data.held_out,
            "facts": {key: data.facts[key] for key in FACTS},
        }
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    new = RECORDS.with_suffix(".new")
    new.write_text(json.dumps(dict(sorted(known.items())), indent=0) + "\n")
    os.replace(new, RECORDS)


def complete(name: str) -> bool:
    """Whether a run is on record."""
    return name in records()


def final_loss(name: str) -> float:
    """Held-out loss after the last step."""
    return records()[name]["loss"]


def label(changes: dict) -> str:
    """A folder name for a setting."""
    return "-".join(f"{field.split('.')[-1]}{value:g}" for field, value in changes.items())


def tuning_name(arm: str, change: dict) -> str:
    """The folder of a tuning run; it holds the setting, learning rate included."""
    rate = {} if arm == "baseline" else best_rate()
    return f"tune-{arm}-{label(rate | change)}{'' if arm == 'baseline' else '-half'}"


def best_rate() -> dict:
    """The baseline's tuned learning rate, which every other arm uses."""
    return best("baseline")


def best(arm: str) -> dict:
    """The setting of an arm with the lowest loss on the tuning seed."""
    done = [c for c in TUNING[arm] if complete(tuning_name(arm, c))]
    if len(done) < len(TUNING[arm]):
        sys.exit(
            f"error: arm {arm} is tuned in {len(done)} of {len(TUNING[arm])} runs; --stage=tune"
        )
    return min(done, key=lambda c: final_loss(tuning_name(arm, c)))


def tuning_jobs(arms: list[str]) -> list[Job]:
    """The baseline first: its learning rate is part of the others' setting."""
    jobs = []
    for arm in arms:
        rate = {} if arm == "baseline" else best_rate()
        for change in TUNING[arm]:
            short = {} if arm == "baseline" else {"train.steps": STEPS // 2}
            fields = tuple((rate | change | short | {"train.eval_every": 0}).items())
            jobs.append(Job(tuning_name(arm, change), arm, TUNING_SEED, fields))
    return jobs


def setting(arm: str) -> dict:
    """An arm's tuned setting, learning rate included."""
    return best_rate() | best(arm)


def main_name(arm: str, seed: int, fraction: float = 1.0) -> str:
    """The folder of a run of the table."""
    part = "" if fraction == 1.0 else f"-part{fraction:g}"
    return f"{arm}-{label(setting(arm))}{part}-seed{seed}"


def main_jobs() -> list[Job]:
    """Every arm with its tuned setting, seed by seed, so that a stop leaves whole comparisons."""
    return [
        Job(main_name(arm, seed), arm, seed, tuple(setting(arm).items()))
        for seed in SEEDS
        for arm in TUNING
    ]


def annealed_jobs() -> list[Job]:
    """LET with its whole schedule (learning rate, S_stop) squeezed into a part of the steps."""
    return [
        Job(
            main_name("let", seed, fraction),
            "let",
            seed,
            (
                *setting("let").items(),
                ("train.steps", round(STEPS * fraction)),
                ("train.eval_every", 0),
            ),
        )
        for seed in SEEDS
        for fraction in FRACTIONS
    ]


def run(jobs: list[Job], until: float, at_once: int) -> None:
    """Runs what is not on record, `at_once` runs a time, and starts nothing after `until`."""
    waiting = [job for job in jobs if not complete(job.name)]
    cores = sorted(os.sched_getaffinity(0))
    free = [set(cores[i::at_once]) for i in range(at_once)]
    running: list[tuple[Job, set[int], subprocess.Popen]] = []
    while waiting or running:
        while waiting and free and time.time() < until:
            job, mine = waiting.pop(0), free.pop(0)
            print(f"{job.name} starts, {len(waiting)} wait", flush=True)
            command = ["taskset", "-c", ",".join(map(str, sorted(mine))), *job.command()]
            running.append((job, mine, subprocess.Popen(command, stdout=subprocess.DEVNULL)))
        if not running:
            print(f"time is up before {waiting[0].name}")
            return
        time.sleep(1.0)
        for entry in [e for e in running if e[2].poll() is not None]:
            running.remove(entry)
            free.append(entry[1])
            harvest()
            if entry[2].returncode or not complete(entry[0].name):
                for other in running:
                    other[2].wait()
                sys.exit(f"error: {entry[0].name} ended with exit code {entry[2].returncode}")
            print(f"   {entry[0].name}: held-out loss {final_loss(entry[0].name):.4f}", flush=True)


def interval(differences: list[float]) -> dict:
    """Mean of paired differences with its 95 % interval."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return {"mean": mean, "half_width_95": None, "each": differences}
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return {"mean": mean, "half_width_95": T95[len(differences) - 1] * error, "each": differences}


def annealed_speed_up(points: list[tuple[float, float]], loss: float) -> str:
    """How many times fewer steps reach `loss`, from annealed runs (fraction of the steps, loss)."""
    for (f0, l0), (f1, l1) in zip(points, points[1:]):
        if l0 > loss >= l1:
            return f"{1 / (f0 + (f1 - f0) * (l0 - loss) / (l0 - l1)):.3f}"
    return f"above {1 / points[0][0]:.3f}" if points[0][1] <= loss else "below 1"


def arm_summary(arm: str) -> dict:
    """Losses, cost and, against the baseline of the same seed, differences of one arm."""
    runs = {
        seed: records()[main_name(arm, seed)] for seed in SEEDS if complete(main_name(arm, seed))
    }
    entry: dict = {"setting": setting(arm)}
    for key in ("loss", "bits_per_byte", "flops", "flops_without_teacher", "wall_s", "curve"):
        entry[key] = {seed: run[key] for seed, run in runs.items()}
    pairs = [seed for seed in runs if complete(main_name("baseline", seed))]
    if arm != "baseline" and pairs:
        entry["minus_baseline"] = interval(
            [runs[seed]["loss"] - final_loss(main_name("baseline", seed)) for seed in pairs]
        )
    return entry


def summary() -> dict:
    """All that the table says, from the runs on record."""
    known = records()
    out: dict = {"tuning": {}, "arms": {}, "annealed": {}, "teacher": known.get("teacher", {})}
    for arm, settings in TUNING.items():
        if arm != "baseline" and len(out["tuning"]["baseline"]) < len(TUNING["baseline"]):
            continue  # Their names hold the baseline's learning rate.
        names = [(c, tuning_name(arm, c)) for c in settings]
        out["tuning"][arm] = [{**c, "loss": final_loss(n)} for c, n in names if complete(n)]
    tuned = [arm for arm in TUNING if len(out["tuning"].get(arm, ())) == len(TUNING[arm])]
    if "baseline" in tuned:
        for arm in tuned:
            out["arms"][arm] = arm_summary(arm)
    if {"baseline", "let"} <= set(tuned):
        for seed in SEEDS:
            names = {f: main_name("let", seed, f) for f in (*FRACTIONS, 1.0)}
            points = [(f, final_loss(name)) for f, name in names.items() if complete(name)]
            base = main_name("baseline", seed)
            if len(points) == len(names) and complete(base):
                speed_up = annealed_speed_up(points, final_loss(base))
                out["annealed"][seed] = {"points": points, "speed_up": speed_up}
    return out


def main() -> None:
    """Runs a stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=["tune", "main", "annealed", "summary"], required=True)
    parser.add_argument("--arms", default=",".join(TUNING), help="arms to tune")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after these")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    args = parser.parse_args()
    until = time.time() + 60 * args.minutes
    harvest()
    if args.stage != "summary" and not (ROOT / "teacher" / "report.html").exists():
        run([Job("teacher", "teacher", 0)], until, 1)
    if args.stage == "tune":
        arms = args.arms.split(",")
        run(tuning_jobs([a for a in arms if a == "baseline"]), until, args.jobs)
        run(tuning_jobs([a for a in arms if a != "baseline"]), until, args.jobs)
    elif args.stage == "main":
        run(main_jobs(), until, args.jobs)
    elif args.stage == "annealed":
        run(annealed_jobs(), until, args.jobs)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(summary(), indent=1) + "\n")
    print(f"written: {OUT}")


if __name__ == "__main__":
    main()
