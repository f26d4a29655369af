"""The chart in a real Kubernetes control plane, where one has been built on this machine."""

import re

from scripts import script


def test_installs_upgrades_rolls_back_evicts_and_scales() -> None:
    """What it does is in cluster.sh; it ends with an error at the first step that goes wrong."""
    last = script("cluster.sh", "--have", timeout=1500)
    match = re.fullmatch(r"cluster: (\d+) steps, \d+ s", last)
    assert match, last
    assert int(match.group(1)) == 21
