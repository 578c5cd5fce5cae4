"""What is true of a whole run: hashes, sizes, versions, the command; kept in `facts.json`."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

import jaxreason
from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.models import decoder
from jaxreason.train.hosts import any_host, meet
from jaxreason.train.manifest import atomic_write

# A resumed run must read the same rows, teacher and base; otherwise its steps mean something else.
SAME = ("corpus_sha256", "plan_sha256", "tokenizer", "teacher_step", "base_sha256")


def commit() -> str:
    """The commit of this checkout; of a copy without git, what its launcher says."""
    here = Path(jaxreason.__file__).parent
    try:
        out = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
        if out.returncode == 0:
            return out.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    return os.environ.get("JAXREASON_COMMIT", "")


def collect(built: Any, command: str) -> dict[str, Any]:
    """The facts of a built run, a flat dict for JSON."""
    cfg, device = built.cfg, jax.devices()[0]
    specs = decoder.specs(cfg.model)
    tables = [specs[name] for name in ("embed", "unembed") if name in specs]
    facts = {
        "command": command,
        "commit": commit(),
        "version": jaxreason.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "cpu_cores": os.cpu_count(),
        "kernels": built.model.kernels,
        "attention": built.model.attention,
        "layers": built.model.layers,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "seed": cfg.run.seed,
        "expected": cfg.run.expected,
        "params": P.count(specs),
        "params_non_embedding": P.count(specs) - P.count(tables),
        "tokens_per_step": cfg.data.batch_size * cfg.data.seq_len,
        "flops_per_step": built.model_flops,
        "flops_per_step_with_teacher": built.flops(built.phases[0]),
        "tokenizer": built.train_data.tokenizer.fingerprint,
        "bytes_per_token": built.held_out.bytes_per_token,
        "corpus_sha256": built.train_data.corpus_sha256,
        "plan_sha256": built.train_data.plan_sha256,
        "held_out_plan_sha256": built.held_out.plan_sha256,
        "rows_an_epoch": built.train_data.num_rows,
    }
    facts |= built.facts
    if built.teacher is not None:
        facts |= built.teacher.facts | {"teacher_params": built.teacher.num_params}
    return facts


def check_same_run(directory: epath.Path, facts: dict[str, Any]) -> None:
    """Raises UserError when the folder holds a run on other data."""
    path = directory / "facts.json"
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text())
    except ValueError:
        return  # Torn by an old kill: it is written anew.
    for name in SAME:
        got = facts.get(name)
        if name in before and before[name] != got:
            raise UserError(
                f"{directory} holds a run whose {name} is {str(before[name])[:12]}, this config's "
                f"is {str(got)[:12]}; choose another run.dir or use that run's config.json"
            )


def check_same_on_hosts(facts: dict[str, Any]) -> None:
    """Raises UserError where this host reads other data, or another base, than the first one.

    The standard library's text, for one, depends on the host's Python.
    """
    if jax.process_count() == 1:
        return
    meet("data")  # One host may tokenise for minutes what another finds in its cache.
    names = ("corpus_sha256", "plan_sha256", "tokenizer", "base_sha256")
    here = hashlib.sha256("".join(str(facts.get(name)) for name in names).encode()).digest()
    mine = np.frombuffer(here, np.uint8)
    first = np.asarray(multihost_utils.broadcast_one_to_all(mine))
    if any_host(not np.array_equal(mine, first)):
        raise UserError(
            "the hosts read different data (corpus, plan, tokenizer or base model); give all of "
            "them the same files and the same Python version"
        )


def save(facts: dict[str, Any], directory: epath.Path) -> None:
    """Writes `facts.json` in one rename."""
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write(directory / "facts.json", json.dumps(facts, indent=1) + "\n")
