"""Scores or times one run of FiRST's table, in a process of its own.

    python -m benchmarks.first_score test RUN TASK EXAMPLES OUT.json
    python -m benchmarks.first_score time RUN TASK EXAMPLES OUT.json

`test` answers test examples greedily, SLOTS at a time, and writes each example's scores, group and
layers (the answers themselves to RUN/test-EXAMPLES.jsonl, where a killed scoring goes on). `time`
measures seconds a token at batch 1, against all layers of the same weights in turn.
"""

import json
import os
import pathlib
import platform
import statistics
import sys
from typing import Any

from benchmarks.first_arms import METRICS
from jaxreason.core.platform import compilation_cache, prepare

STOP = {"docstrings": ("\n",), "gsm_symbolic": ()}
NEW_TOKENS = {"docstrings": 48, "gsm_symbolic": 256}
TOKENS_TIMED = 48
SLOTS = 16
"""Answers decoded at a time. CPU seconds for 64 examples on one core at 8, 16 and 32: 35.5, 32.7
and 40.1 (gsm_symbolic, all layers), 19.5, 20.3 and 18.7 (docstrings, FiRST; prompts are most)."""
AT_ONCE = 100
"""Examples between two writes of the file of answers."""


def test_examples(task: str, count: int) -> list:
    """Test examples spread evenly over the task's, the same for every run."""
    from jaxreason.data.tasks import Docstrings, GsmSymbolic

    sources = {
        "docstrings": Docstrings(part="test"),
        "gsm_symbolic": GsmSymbolic(part="test", seed=1),
    }
    found = sources[task].examples
    count = min(count, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def open_run(folder: pathlib.Path, dtype: str = "auto"):
    """A run's model with its encoder, by the data settings that it was trained with."""
    from jaxreason import config as config_lib
    from jaxreason.recipes import recipes
    from jaxreason.recipes.encode_examples import make_encode
    from jaxreason.recipes.open_model import open_model

    path = folder / "config.json"
    cfg = config_lib.load(path.read_text(), recipes(), where=str(path))
    model = open_model(folder, dtype=dtype)
    return model, make_encode(model, cfg.data)


def count_learned(folder: pathlib.Path, steps: int) -> float:
    """The sum of the loss weights of a run's first `steps` batches, which are made anew."""
    from jaxreason import config as config_lib
    from jaxreason.data.pairs_build import open_pairs
    from jaxreason.recipes import recipes
    from jaxreason.recipes.encode_examples import make_encode
    from jaxreason.recipes.open_model import inspect

    path = folder / "config.json"
    cfg = config_lib.load(path.read_text(), recipes(), where=str(path))
    model, _ = inspect(folder)
    assert model.tokenizer is not None
    data = open_pairs(cfg.data, model.tokenizer, make_encode(model, cfg.data)).dataset("train")
    return float(sum(data.batch(step)["loss_weights"].sum() for step in range(steps)))


def score(folder: pathlib.Path, task: str, examples: list) -> dict:
    """Scores by example, in the order of the examples, and the layers that each ran."""
    from jaxreason.data.tasks import sha256
    from jaxreason.eval.task import evaluate, means
    from jaxreason.recipes.base import identity
    from jaxreason.recipes.score_task import AnswerConfig, answerer, asked_of

    model, encode = open_run(folder)
    cfg = AnswerConfig(max_new_tokens=NEW_TOKENS[task], stop=STOP[task], slots=SLOTS)
    asked: Any = asked_of(model, encode, cfg, identity(folder))
    records = evaluate(
        answerer(model, encode, cfg),
        sorted(examples, key=lambda example: len(example.prompt)),
        METRICS[task],
        path=folder / f"test-{len(examples)}.jsonl",
        batch_size=AT_ONCE,
        asked=asked,
    )
    by_name = {record.name: record for record in records}
    found = [by_name[example.name] for example in examples]
    count = model.config.num_layers
    return {
        "examples_sha256": sha256(examples),
        "groups": [record.group for record in found],
        "means": means(found),
        "scores": {m: [round(r.scores[m], 3) for r in found] for m in METRICS[task]},
        "sets": [
            "1" * count
            if r.layers is None
            else "".join("01"[layer in r.layers] for layer in range(count))
            for r in found
        ],
    }


def clock(folder: pathlib.Path, examples: list) -> dict:
    """Median seconds a token as the run chooses and with all layers, and each example's."""
    from jaxreason.recipes.score_task import times_per_token

    model, encode = open_run(folder)
    found = times_per_token(model, encode, examples, tokens=TOKENS_TIMED)
    return {
        "seconds_per_token": statistics.median(own for own, _, _ in found),
        "all_layers": statistics.median(whole for _, whole, _ in found),
        "ratio": statistics.median(own / whole for own, whole, _ in found),
        "each": [[round(own, 6), round(whole, 6), layers] for own, whole, layers in found],
        "dtype": model.dtype,
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def main(argv: list[str]) -> None:
    """Does one of the two and writes its result, whole or not at all."""
    what, folder, task, count, out = argv
    compilation_cache()
    examples = test_examples(task, int(count))
    run = pathlib.Path(folder)
    result = score(run, task, examples) if what == "test" else clock(run, examples)
    result["asked"] = int(count)
    new = pathlib.Path(f"{out}.new")
    new.write_text(json.dumps(result) + "\n")
    os.replace(new, out)


if __name__ == "__main__":
    prepare(restart=True, onednn=False)
    main(sys.argv[1:])
