"""Tools built by tools.sh, and what tests/e2e has: servers, the carried layer, the command line."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "e2e"))

# The scripts' "cannot be had here", as against "failed".
NOT_HERE = 3


def script(name: str, *arguments: str, timeout: float) -> str:
    """Runs a script of this folder; the last line it printed. Skips where it says it cannot."""
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


@pytest.fixture(scope="session")
def helm() -> Path:
    """Built the first time, which takes minutes."""
    tools = Path(script("tools.sh", "helm", timeout=3000))
    (program,) = tools.glob("helm-*/helm")
    return program
