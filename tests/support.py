"""Running code in a process of its own: with simulated devices, or to be killed."""

import os
import pathlib
import subprocess
import sys
import textwrap

REPO = pathlib.Path(__file__).resolve().parent.parent


def environment(devices: int = 1, **extra: str) -> dict[str, str]:
    """Returns the environment of a child with `devices` simulated CPU devices.

    It takes over the settings of `conftest.py`, and finds the package and this folder without an
    install.
    """
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "PYTHONPATH": path,
        **extra,
    }


def run_python(
    code: str | pathlib.Path, *args: str, devices: int = 8, timeout: float = 300, **extra: str
) -> str:
    """Runs code in a fresh interpreter from the repository's root and returns its stdout.

    Args:
      code: source text (its common indentation is removed), or the path of a file.
      *args: what the code finds in `sys.argv[1:]`.
      devices: the number of simulated CPU devices.
      timeout: in seconds.
      **extra: environment variables.

    Raises:
      AssertionError: with the tail of its output, when it fails or takes longer than `timeout`.
    """
    if isinstance(code, pathlib.Path):
        command = [sys.executable, str(code), *args]
    else:
        command = [sys.executable, "-c", textwrap.dedent(code), *args]
    try:
        done = subprocess.run(
            command,
            cwd=REPO,
            env=environment(devices, **extra),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        # The exception carries bytes even where text was asked for.
        output = (error.stderr or error.stdout or b"").decode(errors="replace")
        raise AssertionError(f"no end within {timeout:.0f} s:\n{tail(output)}") from None
    if done.returncode:
        raise AssertionError(f"exit code {done.returncode}:\n{tail(done.stderr or done.stdout)}")
    return done.stdout


def tail(text: str, lines: int = 40) -> str:
    """Returns the last `lines` lines of `text`."""
    return "\n".join(text.splitlines()[-lines:])
