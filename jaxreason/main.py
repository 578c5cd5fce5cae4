"""The command line.

    python -m jaxreason.main --config=experiments/let/stdlib.py [--config.train.steps=200 ...]
    python -m jaxreason.main --config=FILE --compile_for=tpu:v5p:4x4x4 [--json=PATH]
    python -m jaxreason.main demo [FOLDER]
    python -m jaxreason.main compare RUN RUN [RUN ...]
    python -m jaxreason.main report RUN [--against=RUN]
    python -m jaxreason.main export RUN --to=tensorboard|wandb|trackio

Exit codes: 0 done, 2 bad input (one line says what), 3 a step does not fit where --compile_for was
to compile it, 75 stopped by a preemption notice after saving (start the same command again).
"""

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from jaxreason.config import Usage
from jaxreason.core.errors import Preempted, UserError, nearest
from jaxreason.core.platform import compilation_cache, prepare, prepare_compile_for

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: launchers start the command again.
PROG = "python -m jaxreason.main"
FLAGS = {
    "compile_for": (
        str,
        "compiles every phase's step for hardware that need not be here (tpu:v5p:4x4x4, "
        "gpu:h100:8), reports memory, transfers and bounds, and trains nothing",
    ),
    "json": (str, "with --compile_for: the file for its report, - for standard output"),
}


def _start_jax() -> None:
    """JAX with its compilation cache, and with the other hosts where there are any."""
    from jaxreason.train import hosts

    compilation_cache()
    hosts.join()


def _train(argv: Sequence[str]) -> int:
    from jaxreason import config
    from jaxreason.recipes import recipes

    modules = recipes()
    command = config.parse(
        argv,
        recipes={module.__name__.rpartition(".")[2]: root for root, module in modules.items()},
        default="pretrain",
        flags=FLAGS,
    )
    if command.help is not None:
        print(command.help)
        return 0
    if (target := command.flags["compile_for"]) is not None:
        from jaxreason.recipes import compile_for

        compilation_cache()
        return compile_for.run(command.config, target, json_path=command.flags["json"] or "")
    if command.flags["json"] is not None:
        raise UserError("--json is the report of --compile_for; give that too")
    _start_jax()
    run = modules[type(command.config)].run
    report = run(command.config, command=shlex.join(["python", "-m", "jaxreason.main", *argv]))
    import jax

    if jax.process_index() == 0:
        print(f"report: {report}")
    return 0


def _demo(argv: Sequence[str]) -> None:
    from jaxreason.recipes import demo

    if len(argv) > 1 or any(a.startswith("-") for a in argv):
        raise UserError(f"demo takes a folder for its runs at the most, got {shlex.join(argv)}")
    _start_jax()
    demo.run(argv[0] if argv else "runs/demo")


def _compare(argv: Sequence[str]) -> None:
    from jaxreason.train.compare import compare

    if len(argv) < 2:
        raise UserError(f"compare takes the folders of two runs or more, got {len(argv)}")
    print(compare(*argv))


def _report(argv: Sequence[str]) -> None:
    from jaxreason.train.report import report_for_run

    run, options = _run_and_options(argv, "report", {"against"})
    print(f"report: {report_for_run(run, against=options.get('against'))}")


def _export(argv: Sequence[str]) -> None:
    from jaxreason.train.readers import export

    run, options = _run_and_options(argv, "export", {"to"})
    if "to" not in options:
        raise UserError("export needs --to=tensorboard, --to=wandb or --to=trackio")
    print(export(run, to=options["to"]))


def _run_and_options(argv: Sequence[str], name: str, known: set[str]) -> tuple[str, dict[str, str]]:
    options, runs = {}, []
    for arg in argv:
        key, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--"):
            runs.append(arg)
        elif key in known and equals:
            options[key] = value
        else:
            hint = nearest(key, known) or f"; expected --{', --'.join(sorted(known))}=VALUE"
            raise UserError(f"{name}: unknown option {arg!r}{hint}")
    if len(runs) != 1:
        raise UserError(f"{name} takes one run's folder, got {len(runs)}: {shlex.join(runs)}")
    return runs[0], options


COMMANDS = {"demo": _demo, "compare": _compare, "report": _report, "export": _export}


def _storage(error: OSError) -> str | None:
    """The line about a full or closed disk, which the user can mend; None for other errors."""
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}; free space, then start the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.strerror}{where}; check the permissions, or choose another folder"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if any(arg.startswith("--compile_for") for arg in given):
        prepare_compile_for()
    else:
        prepare(restart=argv is None)
    argv = given
    try:
        if argv and not argv[0].startswith("-"):
            if argv[0] not in COMMANDS:
                known = ", ".join(COMMANDS)
                hint = nearest(argv[0], COMMANDS) or f"; expected {known}, or --config=FILE"
                raise UserError(f"unknown command {argv[0]!r}{hint}")
            COMMANDS[argv[0]](argv[1:])
        else:
            return _train(argv)
    except UserError as error:
        usage = isinstance(error, Usage)
        print(error if usage else f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # The reader of our output has gone (`--help | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return EXIT_PREEMPTED
    except Exception as error:
        if isinstance(error, OSError) and (line := _storage(error)) is not None:
            print(f"error: {line}", file=sys.stderr)
            return EXIT_USER_ERROR
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    # The module imported by name, so that a config file's classes are those of the command.
    from jaxreason.main import main as imported_main

    code = imported_main()
    if "jax" in sys.modules:
        from jaxreason.train.hosts import leave

        code = leave(code)
    sys.exit(code)
