"""The data directory that tests/data carries: the work that it holds, and its times.

tests/data/make_data_dir.py asked an earlier server for this work; data_dir_test.py asks the server
under test about it. Nothing here may change without making the directory anew.
"""

import ctypes
import ctypes.util
import json
import shutil
import sqlite3
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import certiq
import numpy as np
from google.protobuf import json_format, timestamp_pb2
from google.protobuf.message import Message
from programs import PATIENCE_SECONDS, ROOT
from raw import Calls, Listener, StoredResult, bearer, job_frames
from stubs import calibration_pb2, job_pb2, spec_pb2
from sums import UPPER, Source, Sums

FOLDER = ROOT / "tests" / "data" / "data_dir_schema_1"
DATA = FOLDER / "data"
EXPECTED = FOLDER / "expected.json"

YEAR = 365 * 24 * 3600
ALICE = "alice"
# A token is no secret in a test.
TOKEN = "alice-token-0123456789"
TOKENS = f"{TOKEN} {ALICE} read,write\n"

IMPORTED = "import-0"
CHUNK_ROWS = 8
# The earlier server took so many chunks of the open calibration's stream.
CHUNKS_TAKEN = 5


def whole_numbers(seed: int, rows: int, columns: int) -> np.ndarray:
    """Numbers in [-8, 8] that depend on no version of numpy: SplitMix64 of seed and place. Their
    sums are exact in any order."""
    place = np.arange(rows * columns, dtype=np.uint64) + np.uint64(seed << 32)
    x = place * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return ((x % np.uint64(17)).astype(np.int64) - 8).reshape(rows, columns)


def rows_of(seed: int, stream_id: str, rows: int, features: int, quantized: bool = False) -> Source:
    x = whole_numbers(seed, rows, features).astype("<f4")
    more = x + np.sign(whole_numbers(seed + 1, rows, features)) if quantized else None
    return Source(stream_id, x, None if more is None else more.astype("<f4"), CHUNK_ROWS)


@dataclass(frozen=True)
class CalibrationWork:
    features: int
    sources: tuple[Source, ...]
    mismatched: bool = False
    fraction: float = 0.0
    sequence_rows: int = 0
    imported: Sums | None = None

    def create(self, client: certiq.Client, name: str, **changes: object) -> certiq.Calibration:
        options: dict[str, object] = {
            "mismatched": self.mismatched,
            "request_id": f"calibration-{name}",
            "held_out_fraction": self.fraction,
            "sequence_rows": self.sequence_rows,
            "labels": (name, "old"),
            "ttl": YEAR,
        }
        return client.calibration(self.features, keep=True, **(options | changes))


CALIBRATIONS = {
    "open": CalibrationWork(
        features=16,
        sources=(rows_of(10, "rank-0", 96, 16),),
        fraction=0.25,
        sequence_rows=4,
        imported=Sums.of(whole_numbers(12, 50, 16)),
    ),
    "matched": CalibrationWork(
        features=32,
        sources=(rows_of(20, "rank-0", 160, 32), rows_of(22, "rank-1", 92, 32)),
        fraction=0.25,
        sequence_rows=8,
    ),
    "mismatched": CalibrationWork(
        features=16, sources=(rows_of(30, "rank-0", 64, 16, quantized=True),), mismatched=True
    ),
    # Fewer tokens than features: without damping no factor stands.
    "singular": CalibrationWork(features=16, sources=(rows_of(40, "rank-0", 4, 16),)),
}
ALICES_CALIBRATION = CalibrationWork(features=16, sources=(rows_of(50, "rank-0", 48, 16),))


def spec(**fields: object) -> spec_pb2.QuantizationSpec:
    return spec_pb2.QuantizationSpec(**fields)


@dataclass(frozen=True)
class JobWork:
    calibration: str
    seed: int
    rows: int
    spec: spec_pb2.QuantizationSpec
    priority: int = 0
    deadline: float | None = None

    def header(self, name: str, calibration_id: str) -> job_pb2.CreateJobHeader:
        header = job_pb2.CreateJobHeader(
            request_id=f"job-{name}",
            layer_name="layer",
            spec=self.spec,
            calibration_id=calibration_id,
            priority=self.priority,
        )
        header.ttl.FromSeconds(YEAR)
        if self.deadline is not None:
            header.deadline.FromNanoseconds(int(self.deadline * 1e9))
        return header

    def weight(self, features: int) -> np.ndarray:
        return (whole_numbers(self.seed, self.rows, features) / 8).astype("<f4")


# A job of such a spec runs long enough to be met running.
SLOW = spec(
    bits=4,
    scale_trials=32,
    polish=64,
    damping=spec_pb2.Damping(
        held_out=spec_pb2.HeldOutDamping(ladder=[0.01 * step for step in range(1, 33)])
    ),
)
JOBS = {
    "dense": JobWork("matched", 60, 8, spec(bits=3, symmetric=False, group_size=8)),
    "gptq": JobWork(
        "matched",
        61,
        16,
        spec(bits=4, group_size=16, format=spec_pb2.FORMAT_GPTQ, order=spec_pb2.ORDER_NATURAL),
    ),
    "held out": JobWork(
        "matched",
        62,
        8,
        spec(
            bits=4,
            order=spec_pb2.ORDER_DECREASING_NORM,
            damping=spec_pb2.Damping(held_out=spec_pb2.HeldOutDamping(ladder=[0.01, 0.1, 1])),
        ),
        priority=7,
    ),
    "qronos": JobWork("mismatched", 63, 8, spec(bits=4, method=spec_pb2.METHOD_QRONOS)),
    "failed": JobWork("singular", 64, 4, spec(bits=4, damping=spec_pb2.Damping(absolute=1e-30))),
    "cancelled": JobWork("matched", 65, 4, spec(bits=4)),
    "expired": JobWork("matched", 66, 4, spec(bits=4), deadline=0.05),
    "running": JobWork("matched", 67, 32, SLOW),
    "queued": JobWork("matched", 68, 8, spec(bits=4, format=spec_pb2.FORMAT_GPTQ_V2), priority=-3),
}
UNENDED = ("running", "queued")
ALICES_JOB = JobWork("alice", 70, 8, spec(bits=4, method=spec_pb2.METHOD_NEAREST))

DAY_MICROS = 24 * 3600 * 10**6
# A copy that is older is made younger before a server sees it: everything expires after a year.
LARGEST_AGE_MICROS = 300 * DAY_MICROS

CALIBRATION_TIMES = ("create_time", "update_time", "finalize_time")
JOB_TIMES = ("create_time", "start_time", "end_time", "deadline_time")


def _checksum() -> Callable[[bytes], int]:
    name = ctypes.util.find_library("xxhash")
    assert name is not None, "libxxhash is not installed, which the server is built with"
    function = ctypes.CDLL(name).XXH3_64bits
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    function.restype = ctypes.c_uint64
    return lambda data: struct.unpack("<q", struct.pack("<Q", function(data, len(data))))[0]


def _encoded(value: object) -> bytes:
    """One column as the checksum of a row sees it (server/store/upgrade.cc)."""
    if value is None:
        return struct.pack("<q", -1)
    if isinstance(value, float):
        return struct.pack("<d", value + 0.0)
    if isinstance(value, int):
        return struct.pack("<q", value)
    data = value.encode() if isinstance(value, str) else bytes(value)
    return struct.pack("<q", len(data)) + data


def move_times(data: Path, micros: int) -> None:
    """Adds to every time in a data directory of schema 1 that no server has open. Rows carry
    checksums of all their columns: the old ones are checked, the new ones written."""
    checksum = _checksum()
    database = sqlite3.connect(data / "state.db")
    database.row_factory = sqlite3.Row
    with database:
        assert database.execute("PRAGMA user_version").fetchone()[0] == 1
        for table, times in (("calibrations", CALIBRATION_TIMES), ("jobs", JOB_TIMES)):
            for found in database.execute(f"SELECT * FROM {table}").fetchall():
                tail = b""
                if table == "calibrations":
                    tail = _lists(database, found["id"])
                row = dict(found)
                stored = row.pop("checksum")
                assert checksum(b"".join(map(_encoded, row.values())) + tail) == stored
                moved = {name: row[name] + micros for name in times if row[name] != 0}
                row |= moved
                moved["checksum"] = checksum(b"".join(map(_encoded, row.values())) + tail)
                columns = ", ".join(f"{name} = ?" for name in moved)
                database.execute(
                    f"UPDATE {table} SET {columns} WHERE id = ?", (*moved.values(), row["id"])
                )
    database.close()


def _lists(database: sqlite3.Connection, calibration_id: str) -> bytes:
    """Labels and streams, which the calibration's checksum covers too."""
    encoded = b""
    for columns, table in (
        ("label", "calibration_labels"),
        ("id, sequence, tokens, imported", "calibration_streams"),
    ):
        rows = database.execute(
            f"SELECT {columns} FROM {table} WHERE calibration_id = ? ORDER BY position",
            (calibration_id,),
        ).fetchall()
        encoded += _encoded(len(rows)) + b"".join(_encoded(v) for row in rows for v in row)
    return encoded


def later(message: Message, micros: int) -> None:
    """Adds to the times of an answer."""
    for field, value in message.ListFields():
        if isinstance(value, timestamp_pb2.Timestamp):
            value.FromMicroseconds(value.ToMicroseconds() + micros)
            assert message.HasField(field.name)


class Wire:
    """Calls of one tenant, message by message."""

    def __init__(self, server: Listener, token: str = "") -> None:
        self._calls = Calls(server)
        self._options = {"timeout": PATIENCE_SECONDS, "metadata": bearer(token)}

    def create_job(self, header: job_pb2.CreateJobHeader, W: np.ndarray) -> job_pb2.Job:
        """Its weights are named "weight"; the package would give them the name of the layer, and a
        request id stands for other content then."""
        return self._calls.jobs.CreateJob(job_frames(header, W), **self._options)

    def watch(self, job_id: str) -> list[job_pb2.Job]:
        """All answers until the call ends by itself."""
        request = job_pb2.WatchJobRequest(job_id=job_id)
        return [answer.job for answer in self._calls.jobs.WatchJob(request, **self._options)]

    def result(self, job_id: str, offset: int = 0) -> StoredResult:
        request = job_pb2.ReadResultRequest(job_id=job_id, byte_offset=offset)
        return StoredResult(offset).take(self._calls.jobs.ReadResult(request, **self._options))

    def sums(
        self, calibration_id: str, portion: int
    ) -> tuple[calibration_pb2.StatisticsHeader, bytes]:
        request = calibration_pb2.ExportStatisticsRequest(
            calibration_id=calibration_id, portion=portion, layout=UPPER
        )
        frames = self._calls.calibrations.ExportStatistics(request, **self._options)
        header = next(frames).header
        return header, b"".join(frame.data for frame in frames)


class Expected:
    """What the earlier server answered, its times moved along with those of the copy."""

    def __init__(self, micros: int) -> None:
        self.all = json.loads(EXPECTED.read_text())
        self.micros = micros

    def id(self, name: str) -> str:
        """The id of a "calibration NAME" or a "job NAME" of this module."""
        return self.all["ids"][name]

    def calibrations(self, tenant: str = "") -> list[calibration_pb2.Calibration]:
        return [
            self._answer(found, calibration_pb2.Calibration())
            for found in self.all["tenants"][tenant]["calibrations"]
        ]

    def jobs(self, tenant: str = "") -> list[job_pb2.Job]:
        """Those that had ended."""
        return [self._answer(found, job_pb2.Job()) for found in self.all["tenants"][tenant]["jobs"]]

    def _answer(self, found: dict, message: Message) -> Message:
        json_format.ParseDict(found, message)
        later(message, self.micros)
        return message


def copy_of_data(to: Path, older: int = 0) -> Expected:
    """Copies the directory and makes it `older` microseconds older than it is, if it is not too
    old to be used as it is."""
    shutil.copytree(DATA, to)
    made = json.loads(EXPECTED.read_text())["made"]["unix_micros"]
    age = time.time_ns() // 1000 - made
    micros = (age if age > LARGEST_AGE_MICROS else 0) - older
    if micros != 0:
        move_times(to, micros)
    return Expected(micros)
