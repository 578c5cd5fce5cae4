"""FiRST and random sets with equally many updates of the adapters, beside FiRST's table.

    python -m benchmarks.first_updates --jobs=2             # random sets with FiRST's 80 updates
    python -m benchmarks.first_updates --jobs=2 --longer    # and FiRST with the peers' 120
    python -m benchmarks.first_updates --minutes=0          # the differences of what is on record

In the table (`first_table`) all arms read the same number of tokens, and FiRST's routers take a
third of them, in which no adapter learns. Here that is taken away, at 20 % skipped: what is left is
the worth of the layers that routers chose, at more tokens for FiRST. Settings, examples and scores
are the table's; records go to docs/results/first_updates.json. `first_table --stage=main` and
`evaluate` must have made the arms of the table that these are held against.
"""

import argparse
import pathlib
import time
from collections.abc import Mapping, Sequence
from functools import partial

from benchmarks import first_table
from benchmarks.first_arms import METRICS, SEEDS, TASKS, Arm, Job, given_length
from benchmarks.first_summary import compared, scores
from benchmarks.first_workers import Work, side_by_side
from jaxreason.eval.bootstrap import seed_interval

RECORDS = pathlib.Path("docs/results/first_updates.json")
SKIP = 0.2
FIRST, RANDOM = Arm("first", SKIP), Arm("random", SKIP)


def cut(task: str, arm: Arm, seed: int, changes: tuple, steps: int) -> Job:
    """A run of the table with another number of updates."""
    return Job(task, arm, seed, (*changes, ("train.steps", steps)))


def jobs(task: str, settings: Mapping[Arm, tuple], longer: bool) -> list[Job]:
    """Random sets with as many updates of the adapters as FiRST has; and FiRST with theirs."""
    steps, stage = given_length(task, FIRST)
    found = [cut(task, RANDOM, seed, settings[RANDOM], steps - stage) for seed in SEEDS]
    if longer:
        found += [cut(task, FIRST, seed, settings[FIRST], steps + stage) for seed in SEEDS]
    return found


def train(todo: Sequence[Job], until: float, at_once: int) -> None:
    """Trains what is not on record."""

    def finish(job: Job, cores: int) -> None:
        entry = first_table.trained(job, cores)
        assert entry is not None, job.name
        print(f"   {job.name}: held-out loss {entry['loss']:.4f}", flush=True)

    works = [
        Work(j.name, j.folder, j.command(), partial(first_table.missing, j), partial(finish, j))
        for j in todo
    ]
    side_by_side(works, at_once, until)


def differences(
    task: str, table: Mapping[str, Mapping], here: Mapping[str, Mapping]
) -> list[tuple[str, str, str, dict]]:
    """FiRST minus random: (updates of the adapters, metric or `loss`, seeds, the difference).

    Seeds count where both sides are scored.
    """
    steps, stage = given_length(task, FIRST)
    found = []
    for updates in (steps - stage, steps):
        sides: list[list[Mapping]] = [[], []]
        for seed in SEEDS:
            given = (
                _run(task, FIRST, seed, updates + stage, (table, here)),
                _run(task, RANDOM, seed, updates, (table, here)),
            )
            if all(run is not None for run in given):
                for side, run in zip(sides, given):
                    side.append(run)
        a, b = sides
        if not a:
            continue
        seeds = ", ".join(str(run["seed"]) for run in a)
        for metric in METRICS[task]:
            entry = compared(a, scores(a, metric), scores(b, metric), True)
            found.append((f"{updates} updates", metric, seeds, entry))
        gaps = [x["loss"] - y["loss"] for x, y in zip(a, b)]
        entry = {"mean": sum(gaps) / len(gaps), "each": gaps}
        if len(gaps) > 1:
            over = seed_interval(gaps)
            entry["seeds_t"] = {"low": over.low, "high": over.high}
        found.append((f"{updates} updates", "loss", seeds, entry))
    return found


def _run(task: str, arm: Arm, seed: int, steps: int, known: Sequence[Mapping[str, Mapping]]):
    """The scored run of an arm, seed and number of updates; None where there is none."""
    for run in (run for records in known for run in records.values()):
        same = (run["task"], run["arm"]["method"], run["arm"]["skip"], run["arm"]["lora"])
        if same == (task, arm.method, arm.skip, arm.lora) and run["seed"] == seed:
            if run["steps"] == steps and "test" in run:
                return run
    return None


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, scores, and prints the differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="gsm_symbolic")
    parser.add_argument("--longer", action="store_true", help="FiRST with the peers' updates too")
    parser.add_argument("--examples", type=int, default=first_table.EXAMPLES)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing after these")
    args = parser.parse_args(argv)
    until, table = time.time() + 60 * args.minutes, first_table.records()
    first_table.main_jobs([args.task], [arm.method for arm in (FIRST, RANDOM)])  # Or says why not.
    settings = {arm: first_table.setting(args.task, arm.method) or () for arm in (FIRST, RANDOM)}
    todo = jobs(args.task, settings, args.longer)
    first_table.RECORDS = RECORDS  # These runs are no part of the table.
    train(todo, until, args.jobs)
    first_table.measure(todo, "test", args.examples, until, args.jobs)
    print("FiRST minus random sets, paired by seed and example:")
    for updates, metric, seeds, entry in differences(args.task, table, first_table.records()):
        bounds = "".join(
            f", {name} {at['low']:+.3f} to {at['high']:+.3f}"
            for name, at in (("examples", entry), ("seeds", entry.get("seeds_t")))
            if at and "low" in at
        )
        print(f"  {updates}, {metric}, seeds {seeds}: {entry['mean']:+.3f}{bounds}")


if __name__ == "__main__":
    main()
