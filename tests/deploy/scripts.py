"""The shell scripts of this folder, as the tests use them."""

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# Their "cannot be had here", as against "failed".
NOT_HERE = 3


def script(name: str, *arguments: str, timeout: float) -> str:
    """Runs one; the last line it printed. Skips the test where it says it cannot."""
    done = subprocess.run(
        ["bash", str(HERE / name), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode == NOT_HERE:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, f"{name} {' '.join(arguments)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip().splitlines()[-1]
