"""Runs the arms of FiRST's table on SmolLM2-135M, scores them, times them, and sums them up.

    python -m benchmarks.first_table --stage=tune --jobs=2      # three rates a method, own seed
    python -m benchmarks.first_table --stage=main --jobs=2      # the compared: 3 seeds; peers: 1
    python -m benchmarks.first_table --stage=evaluate --jobs=2  # answers to test examples, scored
    python -m benchmarks.first_table --stage=time               # seconds a token, batch 1, alone
    python -m benchmarks.first_table --stage=summary            # docs/results/first.{json,html}

Two tasks: docstrings (ROUGE-L, chrF; test packages that training never saw) and gsm_symbolic (exact
answer; other seed, other questions). A run is `experiments/first/smollm2.py:TASK,METHOD,skip=R,
seed=N`; `--list` prints the runs of a stage. What is on record (docs/results/first_runs.json) is
not done again, a run that was killed goes on, and a scoring goes on behind its last line. Methods
that the config file does not know are named and left out.

With `--jobs=N`, N runs go on at a time, each on its share of the cores: on two cores, two processes
of one core do more than one of two. Several tables may work at the same records. Times are measured
one at a time, with nothing beside: of each arm one seed with adapters (first_arms.timed), the
first whose folder is there.

Every method has the same tuning runs (first_arms.TUNING), at 20 % skipped and half length, judged
by the loss on held-out examples of the training part, on docstrings (first_arms.TUNED_ON); test
examples are read by `evaluate` alone. An arm with adapters and one without have one setting.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from benchmarks.first_arms import (
    ARMS,
    CONFIG,
    SEEDS,
    TASKS,
    TUNING,
    Job,
    chosen,
    given_hash,
    offered,
    timed,
    tuning_jobs,
)
from benchmarks.first_workers import Work, locked, side_by_side
from jaxreason.core.errors import UserError
from jaxreason.train.runs import RunData, load_run

RECORDS = pathlib.Path("docs/results/first_runs.json")
OUT = pathlib.Path("docs/results/first.json")
PAGE = pathlib.Path("docs/results/first.html")
LEAST_TOKENS = 200_000
EXAMPLES = 200
"""Test examples of a task that are answered, spread evenly over its test part."""
TIMED = 8
"""Test examples that a time is the median of, each with all layers in turn."""
FACTS = ("commit", "version", "python", "jax", "jaxlib", "device", "corpus_sha256", "plan_sha256")


def records() -> dict[str, dict]:
    """What is on record, by the name of the run."""
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def keep_record(name: str, **entries: object) -> None:
    """Adds entries to a run's record; several processes may do so at once."""
    with locked(RECORDS):
        known = records()
        known[name] = {**known.get(name, {}), **entries}
        new = RECORDS.with_name(f".{RECORDS.name}.new")
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(known.items())]
        new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(new, RECORDS)


def trained(job: Job, cores: int | None = None) -> dict | None:
    """A run's record, from its folder where it has just ended; None where it is not complete."""
    known = records().get(job.name)
    if known is None and (job.folder / "report.html").exists():  # What a run writes last.
        data = load_run(job.folder)
        last = [row for row in data.rows if row["kind"] == "eval"][-1]
        keep_record(
            job.name,
            task=job.task,
            arm=dataclasses.asdict(job.arm),
            seed=job.seed,
            setting=job.setting,
            given=given_hash(job.task, job.arm),
            loss=last["loss"],
            steps=data.last_step,
            tokens=data.tokens if job.arm.learns else 0.0,
            learned_tokens=learned_tokens(job, data) if job.arm.learns else 0.0,
            flops=data.flops,
            wall_s=data.wall_time_s,
            cores=cores,
            kept_layers=last.get("depth/kept_layers"),
            facts={key: data.facts.get(key) for key in FACTS},
        )
        known = records()[job.name]
    if known is not None and known.get("given") != given_hash(job.task, job.arm):
        raise UserError(
            f"{job.name} is on record with another config file than {CONFIG} is now; take it from "
            f"{RECORDS} and move {job.folder} away"
        )
    return known


def learned_tokens(job: Job, data: RunData) -> float:
    """Targets that a run's loss was a mean of, all its updates together (sum of loss weights).

    From its log where that has them, from another run of the same rows, or counted anew.
    """
    if (logged := data.last("train", "learned_tokens")) is not None:
        return logged
    rows = (data.facts.get("plan_sha256"), data.facts.get("corpus_sha256"), data.last_step)
    for other in records().values():
        facts, known = other.get("facts", {}), other.get("learned_tokens")
        if (facts.get("plan_sha256"), facts.get("corpus_sha256"), other.get("steps")) == rows:
            if known and all(rows):  # 0 stands where nothing was trained.
                return known
    from benchmarks.first_score import count_learned

    return count_learned(job.folder, data.last_step)


def setting(task: str, method: str) -> tuple[tuple[str, object], ...] | None:
    """The setting of the lowest held-out loss; None before all tuning runs are on record."""
    for job in tuning_jobs(task, method):
        trained(job)
    return chosen(task, method, records())


def methods_here(wanted: Sequence[str]) -> list[str]:
    """Those of the methods that the config file knows; a line names each of the others."""
    for method in wanted:
        if method not in offered():
            print(f"note: {CONFIG} has no method {method}; its arms are left out", flush=True)
    return [method for method in wanted if method in offered()]


def main_jobs(tasks: Sequence[str], methods: Sequence[str]) -> list[Job]:
    """Every arm with its tuned setting, seed by seed, so that a stop leaves whole comparisons."""
    settings = {(task, method): setting(task, method) for task in tasks for method in methods}
    if missing := [f"{method} on {task}" for (task, method), s in settings.items() if s is None]:
        sys.exit(f"error: not tuned: {', '.join(missing)}; run --stage=tune first")
    return [
        Job(task, arm, seed, settings[task, arm.method] or ())
        for seed in SEEDS
        for task in tasks
        for arm in ARMS
        if arm.method in methods and seed in arm.seeds
    ]


def train(jobs: Sequence[Job], until: float, at_once: int) -> None:
    """Trains what is not on record, and starts nothing after `until`."""

    def finish(job: Job, cores: int) -> None:
        entry = trained(job, cores)
        if entry is None:
            sys.exit(f"error: {job.name} ended without a report")
        took = f"{entry['wall_s']:.0f} s, {cores} core{'s' * (cores > 1)}"
        print(f"   {job.name}: held-out loss {entry['loss']:.4f}, {took}", flush=True)
        check_length(job, entry)

    for job in jobs:
        if (entry := trained(job)) is not None:
            check_length(job, entry)
    side_by_side(
        [
            Work(job.name, job.folder, job.command(), partial(missing, job), partial(finish, job))
            for job in jobs
        ],
        at_once,
        until,
    )


def check_length(job: Job, entry: Mapping) -> None:
    """Ends the table where a run of the table saw fewer tokens than the claim asks for."""
    if job.arm.lora and not job.tuning and entry["tokens"] < LEAST_TOKENS:
        sys.exit(f"error: {job.name} saw {entry['tokens']:.0f} tokens of {LEAST_TOKENS:,}")


def missing(job: Job) -> bool:
    """Whether a run is still to be trained."""
    return trained(job) is None


def measure(jobs: Sequence[Job], what: str, examples: int, until: float, at_once: int) -> None:
    """Scores (`test`) or times (`time`) the trained runs for which that is not on record.

    A scoring of another number of examples is none.
    """

    def out(job: Job) -> pathlib.Path:
        return job.folder / f"{what}-{examples}.json"

    def waits(job: Job) -> bool:
        entry = trained(job)
        if entry is None or entry.get(what, {}).get("asked") == examples:
            return False
        if out(job).exists():  # A table that was killed did not put it on record.
            finish(job, 0)
            return False
        return True

    def finish(job: Job, cores: int) -> None:
        keep_record(job.name, **{what: json.loads(out(job).read_text())})

    def command(job: Job) -> list[str]:
        module = [sys.executable, "-m", "benchmarks.first_score", what]
        return [*module, str(job.folder), job.task, str(examples), str(out(job))]

    untrained = [job.name for job in jobs if trained(job) is None]
    if untrained:
        print(f"note: {len(untrained)} of {len(jobs)} runs are not trained yet", flush=True)
    side_by_side(
        [
            Work(f"{what}-{j.name}", j.folder, command(j), partial(waits, j), partial(finish, j))
            for j in jobs
        ],
        at_once,
        until,
    )


def timeable(job: Job) -> bool:
    """Whether a run is timed already or can be: its folder may be gone from this machine."""
    return "time" in records().get(job.name, {}) or (job.folder / "report.html").exists()


def check_examples(tasks: Iterable[str]) -> None:
    """Refuses a task whose examples are others here than those of the runs on record.

    The docstrings are those of the running Python's library, so another Python is another task.

    Raises:
      UserError: the digests differ.
    """
    from benchmarks.first_score import test_examples
    from jaxreason.data.tasks import sha256

    for task in tasks:
        scored = [r for r in records().values() if r.get("task") == task and "test" in r]
        known = {r["test"]["examples_sha256"]: r for r in scored if r["test"]["asked"] == EXAMPLES}
        if known and (here := sha256(test_examples(task, EXAMPLES))) not in known:
            digest, run = next(iter(known.items()))
            theirs = run.get("facts", {}).get("python")
            raise UserError(
                f"{task}: the {EXAMPLES} test examples here have the digest {here[:8]} (Python "
                f"{platform.python_version()}); the runs in {RECORDS} answered {digest[:8]} "
                f"(Python {theirs}); use that Python, or move {RECORDS} away"
            )


def sum_up() -> None:
    """Writes the summary and its page, and names what was left out of it."""
    from benchmarks.first_report import write
    from benchmarks.first_summary import summary

    result = summary(records())
    for line in result["notes"]:
        print(f"note: {line}", flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    write(PAGE, result)
    print(f"written: {OUT}, {PAGE}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = ["tune", "main", "evaluate", "time", "summary"]
    parser.add_argument("--stage", choices=stages, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(TUNING))
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="test examples of a task")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing after these")
    parser.add_argument("--list", action="store_true", help="print the runs and do nothing")
    args = parser.parse_args(argv)
    until, tasks = time.time() + 60 * args.minutes, args.tasks.split(",")
    for flag, got, known in (("tasks", tasks, TASKS), ("methods", args.methods.split(","), TUNING)):
        if unknown := [name for name in got if name not in known]:
            parser.error(f"--{flag}: {unknown[0]!r}; expected some of {', '.join(known)}")
    if args.stage == "time" and args.jobs != 1:
        parser.error(f"--jobs={args.jobs}: times are measured one at a time; expected 1")
    if args.examples < 2:
        parser.error(f"--examples={args.examples}; expected 2 or more")
    if args.stage == "summary":
        sum_up()
        return
    if args.stage != "time" and not args.list:
        check_examples(tasks)
    methods = methods_here(args.methods.split(","))
    if args.stage == "tune":
        runs = [job for task in tasks for method in methods for job in tuning_jobs(task, method)]
        jobs = list(dict.fromkeys(runs))  # Tasks may share them.
    else:
        jobs = main_jobs(tasks, methods)
        jobs = timed(jobs, timeable) if args.stage == "time" else jobs
    if args.list:
        print("\n".join(f"{'done' if trained(job) else '    '} {job.name}" for job in jobs))
    elif args.stage in ("tune", "main"):
        train(jobs, until, args.jobs)
    elif args.stage == "evaluate":
        measure(jobs, "test", args.examples, until, args.jobs)
    else:
        measure(jobs, "time", TIMED, until, 1)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
