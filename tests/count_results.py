"""Adds up what the test runners reported.

python3 tests/count_results.py RESULTS_DIR... Each folder's stages.tsv has one line a check, with
tabs between: its name, its exit status, the JUnit file its runner wrote, or "-" where the check
itself is the test, and, if ctest ran shards of GoogleTest programs, the folder of their own files,
<ctest's name>.xml. A runner that failed without reporting a failure counts as one. The last line
printed is the sum; the exit status tells whether all is well.
"""

import re
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


# What XML 1.0 does not allow in a document. GoogleTest writes a parameter's bytes as they are.
FORBIDDEN = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")


def parse_junit(path: Path) -> ElementTree.Element:
    text = path.read_bytes().decode("utf-8", "replace")
    # The declaration names the encoding that the bytes had.
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
    return ElementTree.fromstring(FORBIDDEN.sub("\ufffd", text))


def read_junit(path: Path, shards: Path | None = None) -> Counts:
    """Counts a case that has a file in `shards` as the tests in there."""
    counts = Counts()
    if not path.is_file():
        return counts
    try:
        root = parse_junit(path)
    except ElementTree.ParseError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return Counts(failed=1)
    for case in root.iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        shard = shards / f"{case.get('name')}.xml" if shards else None
        if shard is not None and shard.is_file():
            within = read_junit(shard)
            # The program failed outside its tests, for example by a leak.
            if failed and within.failed == 0:
                within.failed = 1
            counts.add(within)
        elif failed:
            counts.failed += 1
        elif (
            case.find("skipped") is not None
            # GoogleTest's own ways to say it.
            or case.get("result") == "skipped"
            or case.get("status") == "notrun"
        ):
            counts.skipped += 1
        else:
            counts.passed += 1
    return counts


def count_stage(status: int, junit: str, shards: str) -> Counts:
    if junit == "-":
        return Counts(passed=1) if status == 0 else Counts(failed=1)
    counts = read_junit(Path(junit), None if shards == "-" else Path(shards))
    ran_nothing = counts.passed + counts.failed == 0
    if counts.failed == 0 and (status != 0 or ran_nothing):
        counts.failed = 1
    return counts


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    total = Counts()
    for folder in arguments:
        lines = (Path(folder) / "stages.tsv").read_text().splitlines()
        if not lines:
            lines = [f"{Path(folder).name}: nothing reported\t1\t-"]
        for line in lines:
            name, status, junit, shards = (*line.split("\t"), "-")[:4]
            counts = count_stage(int(status), junit, shards)
            total.add(counts)
            print(f"{name + ':':<36} {counts}")
    print(total)
    return 0 if total.failed == 0 and total.passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
