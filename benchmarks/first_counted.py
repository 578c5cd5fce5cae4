"""Which records belong to FiRST's table as it is now, and what they are completed by."""

import collections
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.first_arms import TASKS, TUNED_ON, TUNING, Arm, chosen, given_hash, tuning_jobs
from jaxreason.core.errors import UserError

SAME_LAYERS = 0.05
"""Mean numbers of layers no farther apart than this are as many, and take one time."""

Run = Mapping
Arms = Mapping[str, list[Run]]


def current(records: Mapping[str, dict]) -> tuple[list[dict], list[str]]:
    """The main runs that belong to the table as it is now, and a note for each kind of others."""
    settings = {(t, m): chosen(t, m, records) for t in TASKS for m in TUNING}
    kept, others = [], collections.defaultdict(list)
    for name, record in records.items():
        if name.startswith("tune-"):
            continue
        arm, key = Arm(**record["arm"]), (record["task"], record["arm"]["method"])
        setting = settings.get(key)
        if setting is None:
            others["of methods that are not tuned now"].append(name)
        elif record["setting"] != dict(setting):
            others["of a setting that is not the tuned one now"].append(name)
        elif record.get("given") != given_hash(record["task"], arm):
            others["of another config file"].append(name)
        elif record["seed"] not in arm.seeds:
            others["of seeds that their arm does not have now"].append(name)
        else:
            kept.append(record)
    now = {job.name for t in TASKS for m in TUNING for job in tuning_jobs(t, m)}
    gone = [name for name in records if name.startswith("tune-") and name not in now]
    others |= {"of the tuning that are not in its grid now": gone} if gone else {}
    return kept, [
        f"{len(names)} run{'s' * (len(names) > 1)} {what}, left out: {', '.join(sorted(names))}"
        for what, names in others.items()
    ]


def check_same(task: str, runs: Sequence[Run]) -> None:
    """Raises UserError where runs answered other examples or learned from other text."""
    told = {
        "answered other test examples": {r["test"]["examples_sha256"] for r in runs},
        "learned from other examples": {
            r["facts"]["corpus_sha256"] for r in runs if r.get("facts", {}).get("corpus_sha256")
        },
    }
    for what, hashes in told.items():
        if len(hashes) > 1:
            raise UserError(
                f"{task}: runs {what}, {len(hashes)} kinds; expected one. Take the runs of all but "
                "one kind from the records, and do them again"
            )


def tuning(records: Mapping[str, dict]) -> dict:
    """Held-out losses of the tuning runs, by task and method; `edge`: the best is an outermost."""
    tuned = dict.fromkeys(TUNED_ON.values())
    out: dict = {task: {} for task in tuned}
    for task, method in ((task, method) for task in tuned for method in TUNING):
        jobs = [job for job in tuning_jobs(task, method) if job.name in records]
        runs = [{**job.setting, "loss": records[job.name]["loss"]} for job in jobs]
        if runs:
            best = chosen(task, method, records)
            rates = [job.changes for job in jobs]
            edge = None if best is None else best in (min(rates), max(rates))
            out[task][method] = {"runs": runs, "best": best and dict(best), "edge": edge}
    return out


def with_times(arms: Arms) -> dict[str, list[Run]]:
    """The arms, their runs with the times that were measured on one run of theirs (`first_arms`).

    A time is that of the same program over as many layers: of another seed, or of the arm with
    adapters. A run that ran another number of layers keeps none.
    """

    def mean_layers(run: Run) -> float:
        return statistics.fmean(row.count("1") for row in run["test"]["sets"])

    out = {}
    for name, runs in arms.items():
        timed = [r for r in (*runs, *arms.get(name.removesuffix("-plain"), ())) if "time" in r]
        out[name] = []
        for run in runs:
            alike = [r for r in timed if abs(mean_layers(r) - mean_layers(run)) <= SAME_LAYERS]
            time = run.get("time") or (alike[0]["time"] if alike else None)
            out[name].append(run if time is None else {**run, "time": time})
    return out
