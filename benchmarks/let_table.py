"""Runs the arms of LET's table, any number at a time, and sums them up in one JSON file.

    python -m benchmarks.let_table --stage=tune       # every arm's settings on the tuning seed
    python -m benchmarks.let_table --stage=main       # five arms, three seeds
    python -m benchmarks.let_table --stage=annealed   # LET with 50 to 87.5 % of the steps
    python -m benchmarks.let_table --stage=summary    # docs/results/let_stdlib.json

A run that is complete is not run again; one that was killed goes on. Every arm gets the same number
of tuning runs on a seed that the table does not use; `main` takes each arm's best.
"""

import argparse
import dataclasses
import json
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
OUT = pathlib.Path("docs/results/let_stdlib.json")
# Four runs an arm. The learning rate is the baseline's choice; every arm may use it.
TUNING = {
    "baseline": [{"optim.learning_rate": r} for r in (1e-3, 2e-3, 3e-3, 4e-3)],
    "let": [{"method.lambda_0": v} for v in (0.1, 0.3, 1.0, 3.0)],
    "distill": [{"method.weight": v} for v in (0.1, 0.3, 0.5, 0.8)],
    "salt": [{"method.weight": v} for v in (0.1, 0.3, 0.5, 0.8)],
    "l2l": [{"method.lambda_0": v} for v in (0.1, 0.3, 1.0, 3.0)],
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


def rows(name: str, kind: str) -> list[dict]:
    """A run's rows of one kind."""
    path = ROOT / name / "metrics.jsonl"
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [row for row in found if row["kind"] == kind]


def complete(name: str) -> bool:
    """Whether a run has its report, which is written last; a name holds the run's settings."""
    return (ROOT / name / "report.html").exists()


def final_loss(name: str) -> float:
    """Held-out loss after the last step."""
    return rows(name, "eval")[-1]["loss"]


def label(changes: dict) -> str:
    """A folder name for a setting."""
    return "-".join(f"{field.split('.')[-1]}{value:g}" for field, value in changes.items())


def best_rate() -> dict:
    """The baseline's tuned learning rate, which every other arm uses."""
    return best("baseline")


def best(arm: str) -> dict:
    """The setting of an arm with the lowest loss on the tuning seed."""
    done = [c for c in TUNING[arm] if complete(f"tune-{arm}-{label(c)}")]
    if len(done) < len(TUNING[arm]):
        sys.exit(
            f"error: arm {arm} is tuned in {len(done)} of {len(TUNING[arm])} runs; --stage=tune"
        )
    return min(done, key=lambda c: final_loss(f"tune-{arm}-{label(c)}"))


def tuning_jobs(arms: list[str]) -> list[Job]:
    """The baseline first: its learning rate is part of the others' setting."""
    jobs = []
    for arm in arms:
        rate = {} if arm == "baseline" else best_rate()
        for change in TUNING[arm]:
            setting = tuple((rate | change).items())
            jobs.append(Job(f"tune-{arm}-{label(change)}", arm, TUNING_SEED, setting))
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


def run(jobs: list[Job], until: float) -> None:
    """Runs what is not complete, one after the other, and starts nothing after `until`."""
    for i, job in enumerate(jobs, 1):
        if complete(job.name):
            continue
        if time.time() > until:
            print(f"time is up before {job.name}")
            return
        print(f"{i}/{len(jobs)} {job.name}", flush=True)
        done = subprocess.run(job.command(), check=False, stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(f"error: {job.name} ended with exit code {done.returncode}")
        print(f"   held-out loss {final_loss(job.name):.4f}", flush=True)


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
    names = {seed: main_name(arm, seed) for seed in SEEDS if complete(main_name(arm, seed))}
    last = {seed: rows(name, "eval")[-1] for seed, name in names.items()}
    runs = {seed: load_run(ROOT / name) for seed, name in names.items()}
    entry: dict = {
        "setting": setting(arm),
        "loss": {seed: row["loss"] for seed, row in last.items()},
        "bits_per_byte": {seed: row["bits_per_byte"] for seed, row in last.items()},
        "flops": {seed: data.flops for seed, data in runs.items()},
        "flops_without_teacher": {
            seed: data.last_step * data.facts["flops_per_step"] for seed, data in runs.items()
        },
        "wall_s": {seed: data.wall_time_s for seed, data in runs.items()},
        "curve": {seed: data.held_out for seed, data in runs.items()},
        "facts": {seed: {k: data.facts[k] for k in FACTS} for seed, data in runs.items()},
    }
    pairs = [seed for seed in names if complete(main_name("baseline", seed))]
    if arm != "baseline" and pairs:
        entry["minus_baseline"] = interval(
            [last[seed]["loss"] - final_loss(main_name("baseline", seed)) for seed in pairs]
        )
    return entry


def summary() -> dict:
    """All that the table says, from the folders that are there."""
    out: dict = {"tuning": {}, "arms": {}, "annealed": {}, "teacher": {}}
    for arm, settings in TUNING.items():
        out["tuning"][arm] = [
            {**c, "loss": final_loss(f"tune-{arm}-{label(c)}")}
            for c in settings
            if complete(f"tune-{arm}-{label(c)}")
        ]
    tuned = [arm for arm in TUNING if len(out["tuning"][arm]) == len(TUNING[arm])]
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
    if complete("teacher"):
        facts = json.loads((ROOT / "teacher" / "facts.json").read_text())
        last = rows("teacher", "train")[-1]
        out["teacher"] = {
            "loss": final_loss("teacher"),
            "flops": last["flops"],
            "tokens": last["tokens"],
            "params_non_embedding": facts["params_non_embedding"],
            "facts": {k: facts[k] for k in FACTS},
        }
    return out


def main() -> None:
    """Runs a stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=["tune", "main", "annealed", "summary"], required=True)
    parser.add_argument("--arms", default=",".join(TUNING), help="arms to tune")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after these")
    args = parser.parse_args()
    until = time.time() + 60 * args.minutes
    if args.stage != "summary" and not complete("teacher"):
        run([Job("teacher", "teacher", 0)], until)
    if args.stage == "tune":
        arms = args.arms.split(",")
        run(tuning_jobs([a for a in arms if a == "baseline"]), until)
        run(tuning_jobs([a for a in arms if a != "baseline"]), until)
    elif args.stage == "main":
        run(main_jobs(), until)
    elif args.stage == "annealed":
        run(annealed_jobs(), until)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(summary(), indent=1) + "\n")
    print(f"written: {OUT}")


if __name__ == "__main__":
    main()
