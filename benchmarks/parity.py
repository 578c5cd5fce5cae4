"""How near every model family is to transformers, in and out again.

    python -m benchmarks.parity --torch=PYTHON [--out=docs/results/parity.json] [--gguf=FILE]

PYTHON has torch and transformers (and gguf, for the last case). It makes random models of odd
shapes with seeds that the tests do not use, larger than theirs; ours load them, are compared, and
export them; PYTHON loads the exports and compares again. With --gguf, real weights: a quantised
SmolLM2 through our reader, against transformers on weights that were dequantised without it.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

if __name__ == "__main__":
    from jaxreason.core.platform import prepare

    prepare()

import jax
import numpy as np

from jaxreason.core.precision import as_dtype
from jaxreason.models import decoder
from jaxreason.models.hf import load_hf, save_hf
from jaxreason.models.model import Model

HERE = pathlib.Path(__file__).parent
COLUMNS = {
    "logits": "max |logit diff|",
    "hidden": "max |state diff|",
    "bf16_ratio": "bf16 ratio",
    "greedy_equal": "greedy",
    "export_logits": "export |logit diff|",
    "export_equal": "export bits",
}


def batch_of(rows, width: int, *, left: bool = False, height: int = 0) -> dict[str, np.ndarray]:
    """A batch of rows, each a list of sequences that share it; padded right, or left."""
    names = ("tokens", "positions", "segment_ids")
    batch = {name: np.zeros((max(height, len(rows)), width), np.int32) for name in names}
    for i, sequences in enumerate(rows):
        at = width - sum(map(len, sequences)) if left else 0
        for number, tokens in enumerate(sequences):
            span = slice(at, at + len(tokens))
            batch["tokens"][i, span] = tokens
            batch["positions"][i, span] = np.arange(len(tokens))
            batch["segment_ids"][i, span] = number + 1
            at += len(tokens)
    return batch


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def _forward(params, batch, cfg, dtype):
    every = tuple(range(cfg.num_layers + 1))
    out = decoder.forward(params, cfg, batch, dtype=as_dtype(dtype), capture=every)
    hidden = jax.numpy.stack([out.captured[i] for i in every])
    return decoder.logits(out), hidden, out.final, out.aux


def forward(model: Model, batch, dtype: str = "") -> dict[str, np.ndarray]:
    """Logits [N,V], hidden states [L+1,N,D] and `final` of a batch's N real tokens, row by row."""
    logits, hidden, final, aux = _forward(model.params, batch, model.config, dtype or model.dtype)
    real = batch["segment_ids"] > 0
    result = {"logits": logits[real], "hidden": hidden[:, real], "final": final[real], "aux": aux}
    return jax.tree.map(lambda x: np.asarray(x, np.float32), result)


def sequences_of(grid: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    """The rows of a right-padded grid as lists."""
    return [row[:n].tolist() for row, n in zip(grid, lengths)]


def log_softmax(x: np.ndarray) -> np.ndarray:
    """In float64, so that what is compared is the logits' precision."""
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """What transformers computed of the model in a folder; see `torch_models.py`."""
    with np.load(folder / "reference.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def kept(ref: dict[str, np.ndarray]) -> list[list[int]]:
    """The sequences whose logits and states are in a reference; the first of its rows."""
    return sequences_of(ref["tokens"], ref["lengths"])[: int(ref["kept_rows"])]


def compare(model: Model, ref: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest differences of logits and states in float32, and of log-probs in bfloat16.

    Those in bfloat16 are to float32 and over more rows than the reference keeps: there our float32
    stands in for that of transformers, which it equals to 1e-4.
    """
    rows = [[row] for row in sequences_of(ref["tokens"], ref["lengths"])]
    batch = batch_of(rows, ref["tokens"].shape[1])
    ours, low = forward(model, batch, "float32"), forward(model, batch, "bfloat16")
    n = len(ref["logits"])
    states = [np.abs(ours["hidden"][:, :n] - ref["hidden"]).max()]
    if ours["final"].shape[1:] == ref["final"].shape[1:]:  # Not behind OPT-350m's projection.
        states.append(np.abs(ours["final"][:n] - ref["final"]).max())
    error = np.abs(log_softmax(low["logits"]) - log_softmax(ours["logits"])).max()
    return {
        "logits": float(np.abs(ours["logits"][:n] - ref["logits"]).max()),
        "hidden": float(max(states)),
        "bf16_ours": float(error),
        "bf16_theirs": float(ref["bf16_error"]),
        "bf16_ratio": float(error / ref["bf16_error"]),
    }


def greedy_equal(model: Model, ref: dict[str, np.ndarray]) -> bool:
    """Whether our greedy text is that of `transformers.generate`, token for token."""
    from jaxreason.rollout import Sampling, generate

    prompts = sequences_of(ref["prompts"], ref["prompt_lengths"])
    done = generate(
        model, prompts, sampling=Sampling(temperature=0.0), ignore_eos=True,
        max_new_tokens=ref["greedy"].shape[1],
    )  # fmt: skip
    return [c.tokens for c in done] == ref["greedy"].tolist()


def stored_dtype(folder: pathlib.Path) -> str:
    """The precision that a model's config.json states."""
    config = json.loads((folder / "config.json").read_text())
    return config.get("dtype") or config["torch_dtype"]


def run_torch(python: str, script: str, *args: str) -> dict:
    """Runs a script of this folder with the other Python; its last line of output is JSON."""
    done = subprocess.run(
        [python, str(HERE / script), *args], capture_output=True, text=True, cwd=HERE.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"error: {script} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(args, folder: pathlib.Path) -> tuple[dict[str, dict], dict]:
    """Every family's row of the table, and the versions."""
    settings = [f"--seed={args.seed}", f"--scale={args.scale}", f"--only={args.only}"]
    made = run_torch(args.torch, "torch_models.py", f"--out={folder / 'in'}", *settings)
    rows = {}
    (folder / "out").mkdir()
    for name in made["families"]:
        source = folder / "in" / name
        model, ref = load_hf(source, dtype="float32"), reference(source)
        rows[name] = {"params": made["families"][name]["params"], **compare(model, ref)}
        rows[name]["greedy_equal"] = greedy_equal(model, ref)
        save_hf(model, folder / "out" / name, dtype=stored_dtype(source))
        print(f"{name}: {rows[name]}", flush=True)
    exports = run_torch(
        args.torch, "torch_models.py", f"--out={folder / 'in'}", f"--exports={folder / 'out'}",
        *settings,
    )  # fmt: skip
    for name, found in exports["families"].items():
        rows[name] |= {
            "export_logits": found["logits"],
            "export_equal": found["tensors_equal"] and found["chat_equal"],
            "export_greedy_equal": found["greedy_equal"],
        }
    return rows, made["versions"]


def table(rows: dict[str, dict]) -> str:
    """The rows as text."""
    lines = [f"{'family':20s} {'params':>8s} " + " ".join(f"{c:>18s}" for c in COLUMNS.values())]
    for name, row in rows.items():
        cells = [f"{name:20s} {row['params']:8d}"]
        for key in COLUMNS:
            value = row[key]
            text = (
                ("equal" if value else "DIFFERENT") if isinstance(value, bool) else f"{value:.2g}"
            )
            cells.append(f"{text:>18s}")
        lines.append(" ".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Prints the table and, with --out, writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", required=True, help="a Python with torch and transformers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=int, default=4, help="widths over those of the tests")
    parser.add_argument("--only", default="", help="some of the families, with commas")
    parser.add_argument("--gguf", default="", help="a quantised SmolLM2 to compare as well")
    parser.add_argument("--out", default="", help="where to write the measurements as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, versions = measure(args, pathlib.Path(folder))
    result = {"families": rows, "seed": args.seed, "scale": args.scale}
    print("\n" + table(rows))
    if args.gguf:
        from benchmarks.parity_gguf import measure as measure_gguf

        result["gguf"] = measure_gguf(args.torch, args.gguf)
        print(f"\nGGUF: {result['gguf']}")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE.parent
    )
    versions |= {"jax": jax.__version__, "commit": commit.stdout.strip()}
    if args.out:
        out = pathlib.Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"versions": versions, **result}, indent=1) + "\n")
        print(f"written: {out}")


if __name__ == "__main__":
    main()
