"""Adds up what the test runners reported.

python3 tests/count_results.py RESULTS_DIR. The folder's stages.tsv has one line a stage: name,
exit status, and the JUnit file its runner wrote, or "-" where the stage itself is the test. A
runner that failed without reporting a failure counts as one. The last line printed is the sum;
the exit status tells whether all is well.
"""

import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Counts:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add(self, other: "Counts") -> None:
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped

    def __str__(self) -> str:
        text = f"{self.passed} passed, {self.failed} failed"
        return f"{text}, {self.skipped} skipped" if self.skipped else text


def read_junit(path: Path) -> Counts:
    counts = Counts()
    if not path.is_file():
        return counts
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts.failed += 1
        elif case.find("skipped") is not None:
            counts.skipped += 1
        else:
            counts.passed += 1
    return counts


def count_stage(status: int, junit: str) -> Counts:
    if junit == "-":
        return Counts(passed=1) if status == 0 else Counts(failed=1)
    counts = read_junit(Path(junit))
    ran_nothing = counts.passed + counts.failed == 0
    if counts.failed == 0 and (status != 0 or ran_nothing):
        counts.failed = 1
    return counts


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    total = Counts()
    for line in (Path(arguments[0]) / "stages.tsv").read_text().splitlines():
        name, status, junit = line.split("\t")
        counts = count_stage(int(status), junit)
        total.add(counts)
        print(f"{name + ':':<36} {counts}")
    print(total)
    return 0 if total.failed == 0 and total.passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
