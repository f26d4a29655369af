"""Tools built by tools.sh, and what tests/e2e has: servers, the carried layer, the command line."""

import sys
from pathlib import Path

import pytest
from scripts import HERE, script

sys.path.insert(0, str(HERE.parent / "e2e"))


@pytest.fixture(scope="session")
def helm() -> Path:
    """Built the first time, which takes minutes."""
    tools = Path(script("tools.sh", "helm", timeout=3000))
    (program,) = tools.glob("helm-*/helm")
    return program
