"""A data directory that an earlier version wrote (tests/data), under the server of today."""

import hashlib
import shutil
import sqlite3
from pathlib import Path

import grpc
import numpy as np
import old_data
import pytest
from conftest import StartServer
from google.protobuf import json_format
from old_data import ALICE, CALIBRATIONS, DATA, IMPORTED, JOBS, TOKEN, UNENDED, Expected, Wire
from programs import Server, run_server
from raw import StoredResult, kinds, refusal, timeless
from stubs import calibration_pb2, certificate_pb2, job_pb2
from work import client_of, fill, stream_of

ENDED = [name for name in JOBS if name not in UNENDED]


class Old:
    """A copy of the directory, and what the earlier server answered."""

    def __init__(self, folder: Path, start_server: StartServer, older: int = 0) -> None:
        self.data = folder / "data"
        self.expected: Expected = old_data.copy_of_data(self.data, older)
        self._start = start_server
        self._tokens = folder / "tokens"

    def start(self, *flags: str) -> Server:
        return self._start("--data_dir", str(self.data), "--workers", "1", *flags)

    def start_with_tokens(self) -> Server:
        self._tokens.touch(mode=0o600)
        self._tokens.write_text(old_data.TOKENS)
        return self.start("--token_file", str(self._tokens))

    def tensors(self) -> int:
        return len(list((self.data / "tensors").iterdir()))


@pytest.fixture
def old(tmp_path: Path, start_server: StartServer) -> Old:
    return Old(tmp_path, start_server)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def certificate_of(found: dict) -> certificate_pb2.Certificate:
    return json_format.ParseDict(found["certificate"], certificate_pb2.Certificate())


def check_result(result: StoredResult, found: dict) -> None:
    assert sha256(result.data) == found["sha256"]
    assert (
        json_format.MessageToDict(result.header, preserving_proto_field_name=True)
        == (found["header"])
    )
    assert result.certificate == certificate_of(found)


def then_known(certificate: certificate_pb2.Certificate) -> bytes:
    """What the earlier version knew of a certificate, and said in other words."""
    copy = certificate_pb2.Certificate()
    copy.CopyFrom(certificate)
    for name in (
        "warnings",
        "squared_error_rounding",
        "reference_energy_rounding",
        "row_rounding",
        "held_out_nearest_relative_error",
        "underflow",
        "loads_in",
    ):
        copy.ClearField(name)
    return timeless(copy)


def check_lists(server: Server, expected: Expected, tenant: str = "", token: str = "") -> None:
    """Once no job uses a calibration: every field of every answer, in the order of then."""
    client, wire = client_of(server, token or None), Wire(server, token)
    ids = {expected.id(f"job {name}") for name in UNENDED}
    calibrations = expected.calibrations(tenant)
    assert [client.get_calibration(found.id).info for found in calibrations] == calibrations
    for found in calibrations:
        found.ClearField("streams")
    for size in (0, 2):
        listed = [calibration.info for calibration in client.calibrations(page_size=size)]
        assert listed == calibrations
        jobs = [job.info for job in client.jobs(page_size=size) if job.id not in ids]
        assert jobs == expected.jobs(tenant)
    for job in expected.jobs(tenant):
        assert client.get_job(job.id).info == job
        assert wire.watch(job.id) == [job]


def check_unended(server: Server, expected: Expected) -> None:
    """The job that a crash met running begins again, and the one that waited runs."""
    client, wire = client_of(server), Wire(server)
    for name, starts in (("running", 2), ("queued", 1)):
        job = client.get_job(expected.id(f"job {name}")).wait()
        assert (job.state, job.info.starts) == ("succeeded", starts), job.info
        assert job.info.request_id == f"job-{name}"
        then = expected.all["later"][name]
        assert then["starts"] == starts
        result = wire.result(job.id)
        certificate = certificate_of(then)
        assert result.certificate is not None
        assert result.certificate.weights_sha256 == certificate.weights_sha256
        assert result.certificate.sums_sha256 == certificate.sums_sha256
        assert result.certificate.relative_error == pytest.approx(
            certificate.relative_error, rel=0.01
        )
        if result.certificate.isa == certificate.isa:
            assert sha256(result.data) == then["sha256"]


def test_everything_is_answered_as_then(old: Old) -> None:
    server = old.start()
    client, wire = client_of(server), Wire(server)
    check_unended(server, old.expected)
    check_lists(server, old.expected)
    tenant = old.expected.all["tenants"][""]
    assert len(tenant["results"]) == 4
    for job, found in tenant["results"].items():
        check_result(wire.result(job), found)
    for calibration, portions in tenant["sums"].items():
        for portion, found in portions.items():
            header, data = wire.sums(calibration, int(portion))
            then = json_format.ParseDict(found["header"], calibration_pb2.StatisticsHeader())
            assert (header, sha256(data)) == (then, found["sha256"])
    for name in ("failed", "cancelled", "expired"):
        job = client.get_job(old.expected.id(f"job {name}"))
        assert job.state == name
        assert kinds(refusal(lambda j=job: wire.result(j.id))) == ["NOT_SUCCEEDED"]
    # What ran now is kept like the rest.
    assert server.stop() == 0
    server = old.start()
    check_unended(server, old.expected)
    check_lists(server, old.expected)


def test_a_result_is_read_on_from_any_offset(old: Old) -> None:
    wire = Wire(old.start())
    job = old.expected.id("job gptq")
    whole = wire.result(job)
    for offset in (1, len(whole.data) // 2, len(whole.data)):
        part = wire.result(job, offset)
        assert (part.data, part.certificate) == (whole.data[offset:], whole.certificate)


def test_tenants_keep_what_is_theirs(old: Old) -> None:
    server = old.start_with_tokens()
    client, wire = client_of(server, TOKEN), Wire(server, TOKEN)
    check_lists(server, old.expected, ALICE, TOKEN)
    ((job, found),) = old.expected.all["tenants"][ALICE]["results"].items()
    check_result(wire.result(job), found)
    assert job == old.expected.id("job alice")
    for others in ("job dense", "job running"):
        failed = refusal(lambda n=others: client.get_job(old.expected.id(n)))
        assert failed.code == grpc.StatusCode.NOT_FOUND
    # Her request ids are hers.
    calibration = old.expected.id("calibration alice")
    work = old_data.ALICES_CALIBRATION
    assert work.create(client, "matched").id == calibration
    header = old_data.ALICES_JOB.header("dense", calibration)
    assert wire.create_job(header, old_data.ALICES_JOB.weight(work.features)).id == job


def test_an_open_calibration_goes_on(old: Old) -> None:
    client = client_of(old.start())
    work = CALIBRATIONS["open"]
    (source,) = work.sources
    calibration = client.get_calibration(old.expected.id("calibration open"))
    stream = stream_of(calibration, source)
    first = stream.progress
    assert (first.received, first.durable) == (old_data.CHUNKS_TAKEN,) * 2
    assert first.tokens == old_data.CHUNKS_TAKEN * source.chunk_rows
    stream.send(source.x)
    last = stream.close()
    assert (last.received, last.durable) == (source.chunks,) * 2
    assert work.imported is not None
    assert not work.imported.import_into(calibration, IMPORTED)
    done = calibration.finalize(expected_streams=[source.stream_id, IMPORTED]).info
    assert done.sums_sha256 == old.expected.all["later"]["open"]["sums_sha256"]
    assert done.held_out_tokens > 0
    assert [str(v) for v in (done.tokens, done.held_out_tokens)] == [
        old.expected.all["later"]["open"][name] for name in ("tokens", "held_out_tokens")
    ]

    # The same in one go.
    again = work.create(client, "open", request_id=None)
    assert again.id != calibration.id
    fill(again, source)
    assert work.imported.import_into(again, IMPORTED)
    assert again.finalize().info.sums_sha256 == done.sums_sha256


@pytest.mark.parametrize("name", list(CALIBRATIONS))
def test_repeated_requests_find_calibrations(old: Old, name: str) -> None:
    client = client_of(old.start())
    work = CALIBRATIONS[name]
    assert work.create(client, name).id == old.expected.id(f"calibration {name}")
    failed = refusal(lambda: work.create(client, name, ttl=60))
    assert failed.code == grpc.StatusCode.ALREADY_EXISTS


def request_of(expected: Expected, name: str) -> tuple[job_pb2.CreateJobHeader, np.ndarray]:
    """What made a job then."""
    work = JOBS[name]
    header = work.header(name, expected.id(f"calibration {work.calibration}"))
    return header, work.weight(CALIBRATIONS[work.calibration].features)


@pytest.mark.parametrize("name", list(JOBS))
def test_repeated_requests_find_jobs(old: Old, name: str) -> None:
    wire = Wire(old.start())
    header, W = request_of(old.expected, name)
    job = wire.create_job(header, W)
    assert job.id == old.expected.id(f"job {name}")
    if name in ENDED:
        (then,) = (found for found in old.expected.jobs() if found.id == job.id)
        assert job == then
    other = job_pb2.CreateJobHeader()
    other.CopyFrom(header)
    other.priority += 1
    for different in ((other, W), (header, -W)):
        failed = refusal(lambda d=different: wire.create_job(*d))
        assert failed.code == grpc.StatusCode.ALREADY_EXISTS


def test_old_sums_serve_new_jobs(old: Old) -> None:
    """The work of the jobs that had succeeded, asked for again: the same bytes on the same isa."""
    server = old.start()
    client, wire = client_of(server), Wire(server)
    for name in ("dense", "gptq", "held out", "qronos"):
        before = old.expected.id(f"job {name}")
        header, W = request_of(old.expected, name)
        header.request_id = ""
        job = client.get_job(wire.create_job(header, W).id).wait()
        assert job.id != before
        assert job.state == "succeeded"
        then, now = wire.result(before), wire.result(job.id)
        assert then.certificate is not None
        assert now.certificate is not None
        if now.certificate.isa == then.certificate.isa:
            assert now.data == then.data
            assert then_known(now.certificate) == then_known(then.certificate)


def test_deletion_frees_the_files(old: Old) -> None:
    server = old.start()
    client = client_of(server)
    assert old.tensors() > 0
    for name in UNENDED:
        client.get_job(old.expected.id(f"job {name}")).wait()
    # A result each, sums of each calibration: weights of jobs that ended are gone.
    tenants = old.expected.all["tenants"].values()
    kept = sum(len(tenant["results"]) + len(tenant["calibrations"]) for tenant in tenants)
    assert old.tensors() == kept + len(UNENDED)
    for found in [*client.jobs(), *client.calibrations()]:
        found.delete()
    assert [*client.jobs(), *client.calibrations()] == []
    assert old.tensors() == 2
    assert server.stop() == 0

    client = client_of(old.start_with_tokens(), TOKEN)
    client.get_job(old.expected.id("job alice")).delete()
    client.get_calibration(old.expected.id("calibration alice")).delete()
    assert old.tensors() == 0


def test_a_running_job_can_be_cancelled_and_deleted(old: Old) -> None:
    client = client_of(old.start())
    for name in UNENDED:
        job = client.get_job(old.expected.id(f"job {name}")).cancel().wait()
        assert job.state in ("succeeded", "cancelled")
        job.delete()
        assert refusal(job.refresh).code == grpc.StatusCode.NOT_FOUND
    assert client.get_calibration(old.expected.id("calibration matched")).info.jobs == 0


def test_a_copy_with_other_times(tmp_path: Path, start_server: StartServer) -> None:
    """In later years these tests need younger times; this one shows that they may be changed."""
    old = Old(tmp_path, start_server, older=30 * old_data.DAY_MICROS)
    server = old.start()
    check_unended(server, old.expected)
    check_lists(server, old.expected)


def contents(data: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(data)): path.read_bytes()
        for path in data.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def test_a_newer_data_directory_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(DATA, data)
    database = sqlite3.connect(data / "state.db")
    database.execute("PRAGMA user_version = 1000")
    database.close()
    before = contents(data)
    done = run_server(
        *("--listen", "127.0.0.1:0", "--metrics_listen", "127.0.0.1:0", "--data_dir", str(data))
    )
    assert done.returncode not in (0, None, -6, -11)
    said = done.stdout + done.stderr
    assert "state.db: was written by a newer version of this program" in said
    assert "1000" in said
    assert contents(data) == before


def refused(data: Path) -> str:
    """What a server says that does not start on it; nothing in it changes."""
    before = contents(data)
    done = run_server(
        *("--listen", "127.0.0.1:0", "--metrics_listen", "127.0.0.1:0", "--data_dir", str(data))
    )
    assert done.returncode not in (0, None, -6, -11)
    assert contents(data) == before
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "names",
    [
        ["incoming/thesis.docx", "tensors/model.safetensors", "tensors/" + "0123456789abcdef" * 2],
        ["incoming/" + "0123456789abcdef" * 2],
        ["lock", "reserve", "tensors/" + "f" * 32],
        ["state.db"],
        [".profile"],
    ],
)
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(
    tmp_path: Path, names: list[str]
) -> None:
    data = tmp_path / "share"
    for name in names:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text("years of work")
    said = refused(data)
    assert f"{data}: is not a data directory of certiq" in said
    assert names[0].split("/")[0] in said
    assert sorted(path.name for path in data.iterdir()) == sorted({n.split("/")[0] for n in names})


def test_a_database_of_somebody_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    data = tmp_path / "share"
    data.mkdir()
    database = sqlite3.connect(data / "state.db", isolation_level=None)
    for sql in (
        "PRAGMA journal_mode = WAL",
        "CREATE TABLE jobs (id, payload)",
        "PRAGMA user_version = 1",
        "INSERT INTO jobs VALUES (1, 'work')",
    ):
        database.execute(sql)
    # As it is while its program runs.
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    database.close()
    for each in (data, copy):
        assert "is not a data directory of certiq" in refused(each)


def test_strangers_in_it_stay_and_are_named_once(old: Old) -> None:
    server = old.start()
    assert server.stop() == 0
    strangers = ("notes.txt", "tensors/model.safetensors", "incoming/thesis.docx")
    for name in strangers:
        (old.data / name).write_text("years of work")
    (old.data / "incoming" / ("ab" * 16)).write_text("of a crash")
    server = old.start()
    check_unended(server, old.expected)
    assert server.stop() == 0
    for name in strangers:
        assert (old.data / name).read_text() == "years of work"
        assert server.log().count(Path(name).name) == 1
    assert [path.name for path in (old.data / "incoming").iterdir()] == ["thesis.docx"]


@pytest.mark.parametrize("name", ["lock", "state.db", "commits", "tensors", "incoming"])
def test_links_in_it_are_refused(old: Old, name: str, tmp_path: Path) -> None:
    assert old.start().stop() == 0
    elsewhere = tmp_path / "elsewhere"
    (old.data / name).rename(elsewhere)
    (old.data / name).symlink_to(elsewhere)
    assert f"{name} is a symbolic link" in refused(old.data)
