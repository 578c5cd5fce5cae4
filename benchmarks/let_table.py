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
    """Whether a run has its report, which is written last."""
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


def main_jobs() -> list[Job]:
    """Every arm with its tuned setting, seed by seed, so that a stop leaves whole comparisons."""
    rate = best_rate()
    return [
        Job(f"{arm}-seed{seed}", arm, seed, tuple((rate | best(arm)).items()))
        for seed in SEEDS
        for arm in TUNING
    ]


def annealed_jobs() -> list[Job]:
    """LET with its whole schedule (learning rate, S_stop) squeezed into a part of the steps."""
    setting = best_rate() | best("let")
    return [
        Job(
            f"let-{fraction:g}-seed{seed}",
            "let",
            seed,
            (*setting.items(), ("train.steps", round(STEPS * fraction)), ("train.eval_every", 0)),
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


def crossing(points: list[tuple[float, float]], loss: float) -> float | None:
    """The fraction of the budget at which annealed runs reach `loss`, by straight lines."""
    for (f0, l0), (f1, l1) in zip(points, points[1:]):
        if (l0 - loss) * (l1 - loss) <= 0 and l0 != l1:
            return f0 + (f1 - f0) * (l0 - loss) / (l0 - l1)
    return None


def summary() -> dict:
    """All that the table says, from the folders that are there."""
    out: dict = {"tuning": {}, "arms": {}, "annealed": {}, "teacher": {}}
    for arm, settings in TUNING.items():
        out["tuning"][arm] = [
            {**c, "loss": final_loss(f"tune-{arm}-{label(c)}")}
            for c in settings
            if complete(f"tune-{arm}-{label(c)}")
        ]
    for arm in TUNING:
        done = [seed for seed in SEEDS if complete(f"{arm}-seed{seed}")]
        if not done:
            continue
        pairs = [seed for seed in done if complete(f"baseline-seed{seed}")]
        names = [f"{arm}-seed{seed}" for seed in done]
        entry = {
            "seeds": done,
            "loss": {seed: final_loss(f"{arm}-seed{seed}") for seed in done},
            "bits_per_byte": {
                seed: rows(f"{arm}-seed{seed}", "eval")[-1]["bits_per_byte"] for seed in done
            },
            "flops": rows(names[0], "train")[-1]["flops"],
            "wall_s": [rows(name, "train")[-1]["time_s"] for name in names],
            "curve": {
                seed: [(r["step"], r["loss"]) for r in rows(f"{arm}-seed{seed}", "eval")]
                for seed in done
            },
        }
        if arm != "baseline" and pairs:
            entry["minus_baseline"] = interval(
                [final_loss(f"{arm}-seed{s}") - final_loss(f"baseline-seed{s}") for s in pairs]
            )
        out["arms"][arm] = entry
    for seed in SEEDS:
        points = [
            (fraction, final_loss(f"let-{fraction:g}-seed{seed}"))
            for fraction in FRACTIONS
            if complete(f"let-{fraction:g}-seed{seed}")
        ]
        if complete(f"let-seed{seed}") and points:
            points.append((1.0, final_loss(f"let-seed{seed}")))
        if points and complete(f"baseline-seed{seed}"):
            fraction = crossing(points, final_loss(f"baseline-seed{seed}"))
            speedup = None if fraction is None else 1 / fraction
            out["annealed"][seed] = {"points": points, "speed_up": speedup}
    if complete("teacher"):
        facts = json.loads((ROOT / "teacher" / "facts.json").read_text())
        last = rows("teacher", "train")[-1]
        out["teacher"] = {
            "loss": final_loss("teacher"),
            "flops": last["flops"],
            "tokens": last["tokens"],
            "params_non_embedding": facts["params_non_embedding"],
            "versions": {k: facts[k] for k in ("jax", "jaxlib", "python", "version", "commit")},
            "corpus_sha256": facts["corpus_sha256"],
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
