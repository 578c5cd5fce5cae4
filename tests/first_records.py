"""Records of FiRST's table as its stages leave them, with invented numbers."""

import numpy as np

from benchmarks.first_arms import ARMS, METRICS, TASKS, TUNING, Arm, Job, given_hash, tuning_jobs

EXAMPLES, LAYERS = 12, 30
GROUPS = {
    "docstrings": ["http"] * 5 + ["io"] * 4 + ["glob", "pty", "pty"],
    "gsm_symbolic": [""] * 12,
}
# Mean score by method, with adapters, at 20 and 40 % skipped; without: that times PLAIN.
QUALITY = {
    "none": (50, 50), "first": (46, 38), "unified": (30, 18), "evenly": (43, 33),
    "random": (40, 27), "influence": (44, 31), "cost": (45, 33), "layerskip": (36, 28),
}  # fmt: skip
PLAIN = 0.5


def tuned() -> dict[str, dict]:
    """All tuning runs; the middle of each method's grid is the best."""
    found = {}
    for task in TASKS:
        for method in TUNING:
            jobs = tuning_jobs(task, method)
            for i, job in enumerate(jobs):
                loss = 1.0 + abs(i - len(jobs) // 2) / 10
                found[job.name] = base(job) | {"loss": loss}
    return found


def base(job: Job) -> dict:
    """What training leaves."""
    return {
        "task": job.task, "seed": job.seed, "setting": job.setting, "loss": 1.0, "steps": 120,
        "given": given_hash(job.task, job.arm),
        "arm": {"method": job.arm.method, "skip": job.arm.skip, "lora": job.arm.lora},
        "tokens": 245760.0 if job.arm.learns else 0.0, "flops": 1e14, "wall_s": 60.0,
        "learned_tokens": 21000.0 if job.arm.learns else 0.0,
        "facts": {"corpus_sha256": job.task, "plan_sha256": f"plan{job.seed}"},
    }  # fmt: skip


def layer_sets(task: str, arm: Arm, seed: int, rng: np.random.Generator) -> list[str]:
    """Every input's set: FiRST's differ by input, by task and a little by seed."""
    kept = round(LAYERS * (1 - arm.skip))
    fixed = np.random.default_rng([seed if arm.method in ("random", "first") else 0, kept])
    weight = fixed.normal(0, 1, LAYERS) + (2 if task == "docstrings" else -2) * np.linspace(
        0, 1, 30
    )
    sets = []
    for _ in range(EXAMPLES):
        own = weight + (rng.normal(0, 0.4, LAYERS) if arm.method == "first" else 0)
        own[[0, -1]] = 99
        chosen = set(np.argsort(-own)[:kept].tolist())
        sets.append("".join("01"[layer in chosen] for layer in range(LAYERS)))
    return sets


def run(job: Job, quality: float) -> dict:
    """What `main`, `evaluate` and `time` leave of a run."""
    rng = np.random.default_rng([job.seed, *job.arm.label.encode()])
    names = GROUPS[job.task]
    by_group = {
        name: np.random.default_rng(list(name.encode())).normal(0, 3) for name in set(names)
    }
    own = [by_group[name] * bool(name) + rng.normal(0, 2) for name in names]
    seed = np.random.default_rng([job.seed, 7]).normal(0, 1)
    metrics = METRICS[job.task]
    ratio = 1 - 0.94 * job.arm.skip
    entry = base(job) | {
        "test": {
            "asked": EXAMPLES,
            "examples_sha256": job.task,
            "groups": names,
            "means": {"finished": 0.9},
            "scores": {m: (quality + seed + np.array(own)).tolist() for m in metrics},
            "sets": layer_sets(job.task, job.arm, job.seed, rng),
        }
    }
    if job.arm.lora and job.seed == 1:
        entry["time"] = {
            "asked": 8, "seconds_per_token": 0.03 * ratio, "all_layers": 0.03, "ratio": ratio,
        }  # fmt: skip
    return entry


def table() -> dict[str, dict]:
    """A whole table: tuning, and every arm's runs on both tasks."""
    found = tuned()
    for task in TASKS:
        for arm in ARMS:
            changes = tuning_jobs(task, arm.method)[1].changes
            for seed in arm.seeds:
                job = Job(task, arm, seed, changes)
                quality = QUALITY[arm.method][arm.skip == 0.4] * (1 if arm.lora else PLAIN)
                found[job.name] = run(job, quality)
    return found


def name_of(task: str, arm: Arm, seed: int) -> str:
    """The name of a run in `table()`."""
    return Job(task, arm, seed, tuning_jobs(task, arm.method)[1].changes).name
