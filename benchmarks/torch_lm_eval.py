"""lm-eval's `hf` model on the committed tiny SmolLM2 and the local tasks: reference numbers.

    python -m benchmarks.torch_lm_eval        with torch, transformers and lm-eval[hf] installed

writes tests/golden/lm_eval_smollm2.json.
"""

import json
import pathlib
import shutil
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TASKS = ["local_choice", "local_perplexity", "local_generate"]
OUT = ROOT / "tests/golden/lm_eval_smollm2.json"


def folder_with_its_end_token(to: pathlib.Path) -> pathlib.Path:
    """The golden model, whose configs name the end token that its tokenizer names."""
    shutil.copytree(ROOT / "tests/golden/hf/smollm2", to)
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((to / name).read_text())
        (to / name).write_text(json.dumps(fields | {"eos_token_id": 2, "torch_dtype": "float32"}))
    return to


def numbers(results: dict) -> dict:
    """Metrics and every sample's responses, of what `simple_evaluate` returns."""
    samples = {
        task: [[list(r) if isinstance(r, list | tuple) else [r] for r in s["resps"]] for s in rows]
        for task, rows in results["samples"].items()
    }
    metrics = {
        task: {k: v for k, v in row.items() if isinstance(v, float) and "stderr" not in k}
        for task, row in results["results"].items()
    }
    return {"metrics": metrics, "samples": samples}


def main() -> None:
    import lm_eval
    import torch
    import transformers
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as temporary:
        folder = folder_with_its_end_token(pathlib.Path(temporary) / "model")
        results = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(folder), "dtype": "float32"}, tasks=TASKS,
            task_manager=TaskManager(include_path=str(ROOT / "tests/fixtures/lm_eval")),
            batch_size=1, device="cpu", bootstrap_iters=0,
        )  # fmt: skip
    versions = {m.__name__: m.__version__ for m in (lm_eval, torch, transformers)}
    OUT.write_text(json.dumps(numbers(results) | {"versions": versions}) + "\n")


if __name__ == "__main__":
    main()
