"""What a runner leaves behind is counted, however it ended."""

import subprocess
import sys
from pathlib import Path

import pytest

import count_results

PASSED = '<testcase name="a" status="run" result="completed"/>'
FAILED = '<testcase name="b" status="run"><failure message="no"/></testcase>'
SKIPPED = '<testcase name="c" status="run" result="skipped"><skipped message="why"/></testcase>'


def junit(path: Path, *cases: str | bytes) -> Path:
    body = b"".join(case if isinstance(case, bytes) else case.encode() for case in cases)
    path.write_bytes(
        b'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites><testsuite name="s">'
        + body
        + b"</testsuite></testsuites>\n"
    )
    return path


def test_passed_failed_and_skipped(tmp_path: Path) -> None:
    counts = count_results.read_junit(junit(tmp_path / "a.xml", PASSED, PASSED, FAILED, SKIPPED))
    assert (counts.passed, counts.failed, counts.skipped) == (2, 1, 1)


@pytest.mark.parametrize("value", [b"\xff\xfe", b"\xc3", b"\x00", b"\x1b[2J", b"\xed\xa0\x80"])
def test_bytes_that_are_no_xml_are_read(tmp_path: Path, value: bytes) -> None:
    case = b'<testcase name="a" value_param="' + value + b'" status="run" result="completed"/>'
    counts = count_results.read_junit(junit(tmp_path / "a.xml", case, FAILED))
    assert (counts.passed, counts.failed) == (1, 1)


def test_a_file_cut_short_is_a_failure(tmp_path: Path) -> None:
    path = junit(tmp_path / "a.xml", PASSED)
    path.write_bytes(path.read_bytes()[:-20])
    assert count_results.read_junit(path).failed == 1


def test_a_shard_is_counted_as_its_tests(tmp_path: Path) -> None:
    shards = tmp_path / "gtest"
    shards.mkdir()
    junit(shards / "x_tests.0.xml", PASSED, PASSED, SKIPPED)
    whole = junit(tmp_path / "ctest.xml", '<testcase name="x_tests.0" status="run"/>')
    counts = count_results.read_junit(whole, shards)
    assert (counts.passed, counts.failed, counts.skipped) == (2, 0, 1)
    # A leak at exit fails the program although each of its tests passed.
    leaked = junit(tmp_path / "leak.xml", FAILED.replace('"b"', '"x_tests.0"'))
    assert count_results.read_junit(leaked, shards).failed == 1


@pytest.mark.parametrize(
    ("stages", "last", "status"),
    [
        ("check\t0\t-\n", "1 passed, 0 failed", 0),
        ("check\t1\t-\n", "0 passed, 1 failed", 1),
        ("", "0 passed, 1 failed", 1),
        ("ran nothing\t0\tmissing.xml\n", "0 passed, 1 failed", 1),
    ],
)
def test_the_last_line_is_the_sum(tmp_path: Path, stages: str, last: str, status: int) -> None:
    (tmp_path / "stages.tsv").write_text(stages)
    run = subprocess.run(
        [sys.executable, count_results.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.splitlines()[-1] == last
    assert run.returncode == status
