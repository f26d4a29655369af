"""Every family of the metrics page, against what the clients of a server saw."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import certiq
import grpc
import numpy as np
import pytest
from expected_metrics import ExpectedMetrics, compare, counted_calls, counted_client
from families import COUNTER, FAMILIES, HISTOGRAM, OUTCOMES, family_of
from programs import PATIENCE_SECONDS, Metrics, Server, http_get, wait_until
from raw import AccumulateCall, Calls, Layer, Pipe, bearer, collect, read_result, refusal
from stubs import certificate_pb2, job_pb2, service_pb2, spec_pb2
from sums import Source, Sums, made_up
from work import BIG, big_job, busy, create

OPTQ = spec_pb2.METHOD_OPTQ


def test_every_family_has_its_type_unit_and_labels(server: Server) -> None:
    text = http_get(server.metrics_port, "/metrics").text
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    assert types == {name: family.type for name, family in FAMILIES.items()}
    for name, family in FAMILIES.items():
        assert family.unit in helps[name].lower(), (name, helps[name])
        assert (family.type == COUNTER) == name.endswith("_total")
    found: dict[str, dict[str, set[str]]] = {name: {} for name in FAMILIES}
    for name, labels, _ in Metrics(text).samples:
        family = family_of(name)
        if FAMILIES[family].type == HISTOGRAM and name.endswith("_bucket"):
            assert labels.pop("le")
        assert labels.keys() == FAMILIES[family].labels.keys(), name
        for label, value in labels.items():
            found[family].setdefault(label, set()).add(value)
    # Every value is there from the start and none can be added: nothing a client sends is a label.
    for name, family in FAMILIES.items():
        if name != "certiq_build_info":
            assert found[name] == family.labels, name


@pytest.fixture
def expected() -> ExpectedMetrics:
    return ExpectedMetrics()


@pytest.fixture
def server_of(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*flags: str) -> Server:
        servers.append(Server(tmp_path / f"server_{len(servers)}", ["--workers", "1", *flags]))
        return servers[-1]

    yield start
    for started in servers:
        assert started.stop() == 0, started.log()


@dataclass
class Problem:
    """A made-up layer and what to do with it."""

    seed: int
    spec: certiq.Spec
    rows: int = 24
    features: int = 48
    tokens: int = 300
    held_out_fraction: float | None = None
    W: np.ndarray = field(init=False)
    X: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        self.W = random.standard_normal((self.rows, self.features), dtype="<f4")
        self.X = random.standard_normal((self.tokens, self.features), dtype="<f4")

    def quantize(
        self, client: certiq.Client, expected: ExpectedMetrics
    ) -> certificate_pb2.Certificate:
        fraction = self.held_out_fraction
        layer = client.quantize(self.W, self.X, self.spec, held_out_fraction=fraction)
        expected.certified(layer.certificate)
        expected.folded(*self.X.shape, self.X.nbytes)
        return layer.certificate


def test_quantize_calls(server_of: Callable[..., Server], expected: ExpectedMetrics) -> None:
    server = server_of()
    before = server.metrics()
    client = counted_client(server, expected)
    for seed, (method, bits) in enumerate(
        [("optq", 4), ("optq", 4), ("optq", 2), ("nearest", 8), ("qronos", 3)]
    ):
        Problem(seed, certiq.Spec(method=method, bits=bits)).quantize(client, expected)
    # A dead feature, and weights far outside a grid that was given.
    grid = certiq.Grid(np.full((24, 1), 0.01))
    odd = Problem(9, certiq.Spec(method="optq", bits=5, grid=grid))
    odd.X[:, 3] = 0
    found = odd.quantize(client, expected)
    assert found.dead_features == 1
    assert found.clipped_weights > 0
    # A ladder on rows that are held out.
    spec = certiq.Spec(method="optq", bits=4, damping="held_out:0.01,0.1")
    ladder = Problem(10, spec, tokens=2048, held_out_fraction=0.25)
    assert len(ladder.quantize(client, expected).ladder) == 2
    page = compare(expected, server, before)
    for state in ("queued", "running", *OUTCOMES):
        assert page.sum("certiq_jobs", state=state) == 0
    assert page.sum("certiq_workers") == 1
    assert page.sum("certiq_build_info", isa=found.isa, version=found.engine_version) == 1
    server.wait_idle()


def twins(method: str, **damping: object) -> Problem:
    """Two equal columns, and next to no damping."""
    spec = certiq.Spec(method=method, bits=4, damping="relative_trace:1e-18", **damping)
    made = Problem(3, spec)
    made.X[:, 1] = made.X[:, 0]
    return made


def test_failures_of_lambda(server_of: Callable[..., Server], expected: ExpectedMetrics) -> None:
    """By method and cause: raised until it stands, given up, rounded to nearest instead."""
    server = server_of()
    before = server.metrics()
    client = counted_client(server, expected)
    causes = set()
    for method, number in (("optq", OPTQ), ("qronos", spec_pb2.METHOD_QRONOS)):
        found = twins(method, max_attempts=20).quantize(client, expected)
        assert found.lambda_used > found.lambda_requested
        causes |= {attempt.cause for attempt in found.damping_attempts[:-1]}

        fallen = twins(method, max_attempts=1, on_failure="nearest")
        found = fallen.quantize(client, expected)
        assert found.outcome == certificate_pb2.OUTCOME_FELL_BACK_TO_NEAREST
        cause = found.damping_attempts[0].cause

        given_up = twins(method, max_attempts=1)
        with pytest.raises(certiq.FailedPrecondition):
            given_up.quantize(client, expected)
        expected.job(number, "failed")
        expected.failed_attempts(number, cause)
        expected.folded(*given_up.X.shape, given_up.X.nbytes)
    assert causes
    compare(expected, server, before)


def fold(
    calls: Calls, expected: ExpectedMetrics, calibration: certiq.Calibration, source: Source
) -> None:
    """Sends all of it, waiting for the answer to the header and reading to the end."""
    call = AccumulateCall(calls, calibration, source)
    call.send(*range(call.next().received, source.chunks))
    call.finish()
    quantized = 0 if source.x_quantized is None else source.x_quantized.nbytes
    expected.folded(*source.x.shape, source.x.nbytes + quantized)


def test_calibrations_and_jobs(
    server_of: Callable[..., Server],
    expected: ExpectedMetrics,
    tmp_path: Path,
    random: np.random.Generator,
) -> None:
    """All calls of both services; chunks that come twice count once."""
    server = server_of("--data_dir", str(tmp_path / "data"))
    before = server.metrics()
    client, calls = counted_client(server, expected), counted_calls(server, expected)
    features = 48
    calibration = create(client, features, mismatched=True, labels=["e2e"])
    source = made_up(random, "rank-0", 320, features, mismatched=True)
    fold(calls, expected, calibration, source)
    # The same stream once more: nothing is left to send.
    again = AccumulateCall(calls, calibration, source)
    assert again.next().received == source.chunks
    again.finish()
    half = made_up(random, "rank-1", 64, features, mismatched=True)
    call = AccumulateCall(calls, calibration, half)
    call.next()
    call.send(0, 0, 1, 1, 0)
    call.finish()
    expected.folded(*half.x.shape, half.x.nbytes + half.x_quantized.nbytes)
    Sums.of(half.x, half.x_quantized).import_into(calibration, "sums")
    calibration.export_statistics()
    calibration.finalize()
    calibration.refresh()
    assert len(list(client.calibrations(page_size=10))) == 1

    W = random.standard_normal((24, features)).astype("<f4")
    made = []
    for seed, bits in enumerate((4, 3, 4)):
        request = {"weight": W, "calibration": calibration, "spec": certiq.Spec(bits=bits)}
        job = client.submit(**request, request_id=f"r-{seed}")
        assert client.submit(**request, request_id=f"r-{seed}").id == job.id
        *_, last = calls.jobs.WatchJob(
            job_pb2.WatchJobRequest(job_id=job.id), timeout=PATIENCE_SECONDS
        )
        assert last.job.state == job_pb2.JOB_STATE_SUCCEEDED
        certificate = read_result(calls, job).certificate
        # One factor serves all of them.
        factored = len(certificate.damping_attempts) if seed == 0 else 0
        expected.certified(certificate, factored=factored)
        expected.add("certiq_factor_cache_total", result="miss" if seed == 0 else "hit")
        made.append(job)
    assert len(list(client.jobs())) == 3
    made.pop().delete()
    page = compare(expected, server, before)
    assert page.sum("certiq_jobs", state="succeeded") == len(made)
    assert page.sum("certiq_jobs") == len(made)
    assert page.sum("certiq_memory_reserved_bytes") > 0
    calibration.delete()
    compare(expected, server, before)


def test_jobs_that_end_otherwise(
    server_of: Callable[..., Server], expected: ExpectedMetrics, random: np.random.Generator
) -> None:
    """Cancelled while it runs and while it waits, expired, failed; and what is busy meanwhile."""
    server = server_of("--queue_limit", "3")
    before = server.metrics()
    client, calls = counted_client(server, expected), counted_calls(server, expected)
    calibration = create(client, 32)
    fold(calls, expected, calibration, made_up(random, "rank-0", 16, 32))
    calibration.finalize()
    W = random.standard_normal((16, 32)).astype("<f4")

    with busy(client, big_job(client)) as running:
        cancelled = client.submit(W, calibration=calibration)
        expired = client.submit(W, calibration=calibration, deadline=0.2)
        page = server.metrics()
        assert page.sum("certiq_jobs", state="running") == 1
        assert page.sum("certiq_jobs", state="queued") == 2
        assert page.sum("certiq_queue_depth") == 2
        assert page.sum("certiq_queue_limit") == 3
        assert page.sum("certiq_workers_busy") == 1
        assert cancelled.cancel().state == "cancelled"
        expected.job(OPTQ, "cancelled", ran=False)
        wait_until(expired.done, "its time is over")
        assert expired.state == "expired"
        expected.job(OPTQ, "expired", ran=False)
        assert running.refresh().info.features == BIG
    expected.job(OPTQ, "cancelled")
    # Fewer tokens than features, and no damping to make up for it.
    spec = certiq.Spec(bits=4, damping="absolute:1e-30", max_attempts=2)
    failed = client.submit(W, calibration=calibration, spec=spec)
    wait_until(failed.done, "it fails")
    assert failed.state == "failed"
    expected.job(OPTQ, "failed")
    moved = server.metrics()
    failures = "certiq_lambda_stability_failures_total"
    assert moved.sum(failures, method="optq") - before.sum(failures, method="optq") == 2
    for cause in ("pivot", "non_finite", "condition"):
        expected.add(
            failures, moved.sum(failures, method="optq", cause=cause), method="optq", cause=cause
        )
    # Its factor was made, and kept nowhere, since it failed; the blocker's ladder asked too.
    for result in ("hit", "miss"):
        found = moved.sum("certiq_factor_cache_total", result=result)
        expected.add("certiq_factor_cache_total", found, result=result)
    page = compare(expected, server, before)
    assert page.sum("certiq_jobs") == 4
    assert page.sum("certiq_jobs", state="cancelled") == 2


def refused(calls: Calls, *frames: service_pb2.QuantizeRequest, token: str = "") -> grpc.StatusCode:
    """The code with which a Quantize call of these frames alone ends."""
    call = calls.quantization.Quantize(iter(frames), timeout=60, metadata=bearer(token))
    return refusal(lambda: list(call)).code


class Upload:
    """A Quantize call that has sent its header and waits."""

    def __init__(
        self, calls: Calls, layer: Layer, expected: ExpectedMetrics, token: str = ""
    ) -> None:
        self._layer, self._expected, self._pipe = layer, expected, Pipe()
        self._pipe.send(layer.header_frame())
        self._call = calls.quantization.Quantize(
            iter(self._pipe), timeout=PATIENCE_SECONDS, metadata=bearer(token)
        )
        # The header was taken.
        next(self._call)

    def finish(self) -> None:
        for frame in self._layer.frames():
            if not frame.HasField("header"):
                self._pipe.send(frame)
        self._pipe.close()
        self._expected.certified(collect(self._call).certificate)
        self._expected.folded(*self._layer.X.shape, self._layer.X.nbytes)


def test_what_is_not_taken_on(
    server_of: Callable[..., Server], expected: ExpectedMetrics, tmp_path: Path
) -> None:
    """Every reason, for every kind of work that it stands for."""
    many, lone = "crowd-token-0123456789", "lone-token-0123456789"
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{many} crowd read,write\n{lone} lone read,write jobs=1 streams=1\n")
    server = server_of(
        *("--token_file", str(tokens), "--queue_limit", "2"),
        *("--memory_budget_bytes", str(128 << 20)),
    )
    before = server.metrics()
    calls = counted_calls(server, expected)
    client, limited = (counted_client(server, expected, token) for token in (many, lone))

    def rejected(reason: str) -> None:
        expected.add("certiq_rejected_total", reason=reason)

    layer, wrong, large = (Layer.made_up(24, 48, 300) for _ in range(3))
    wrong.header.spec.bits = 9
    assert refused(calls, wrong.header_frame(), token=many) == grpc.StatusCode.INVALID_ARGUMENT
    rejected("invalid")
    for features, code, reason in (
        (0, grpc.StatusCode.INVALID_ARGUMENT, "invalid"),
        (8192, grpc.StatusCode.RESOURCE_EXHAUSTED, "over_budget"),
    ):
        assert refusal(lambda n=features: create(client, n)).code == code
        rejected(reason)
    nameless = made_up(np.random.default_rng(1), "", 32, 32)
    call = AccumulateCall(calls, create(client, 32), nameless, many)
    assert call.failure().code == grpc.StatusCode.INVALID_ARGUMENT
    rejected("invalid")

    not_offered = Layer.made_up(24, 48, 300)
    not_offered.header.spec.polish = 1 << 20
    code = refused(calls, not_offered.header_frame(), token=many)
    rejected("not_offered" if code == grpc.StatusCode.UNIMPLEMENTED else "invalid")

    large.header.weight.shape[:] = [8192, 8192]
    large.header.x.shape[:] = [64, 8192]
    assert refused(calls, large.header_frame(), token=many) == grpc.StatusCode.RESOURCE_EXHAUSTED
    rejected("over_budget")

    # Uploads have the tenant's only place, then all places there are.
    held = Upload(calls, layer, expected, lone)
    assert refused(calls, layer.header_frame(), token=lone) == grpc.StatusCode.RESOURCE_EXHAUSTED
    rejected("quota")
    own = create(limited, 32)
    first, second = (
        AccumulateCall(calls, own, made_up(np.random.default_rng(1), name, 32, 32), lone)
        for name in "ab"
    )
    first.next()
    assert second.failure().code == grpc.StatusCode.RESOURCE_EXHAUSTED
    rejected("quota")
    first.finish()
    more = Upload(calls, layer, expected, many)
    assert refused(calls, layer.header_frame(), token=many) == grpc.StatusCode.RESOURCE_EXHAUSTED
    rejected("queue_full")
    for upload in (held, more):
        upload.finish()
    compare(expected, server, before)


def test_a_drain(server_of: Callable[..., Server], expected: ExpectedMetrics) -> None:
    server = server_of("--drain_seconds", "100")
    before = server.metrics()
    assert before.sum("certiq_drain_start_time_seconds") == 0
    assert before.sum("certiq_drain_limit_seconds") == 100
    client, calls = counted_client(server, expected), counted_calls(server, expected)
    calibration = create(client, 32)
    layer = Layer.made_up(24, 48, 300)
    upload = Upload(calls, layer, expected)
    began = time.time()
    server.terminate()
    wait_until(lambda: server.metrics().sum("certiq_drain_start_time_seconds") > 0, "it drains")
    since = server.metrics().sum("certiq_drain_start_time_seconds")
    assert began - 1 <= since <= time.time() + 1
    # Where the server still listens to: every kind of new work.
    assert refused(calls) == grpc.StatusCode.UNAVAILABLE
    for call in (
        lambda: create(client, 32),
        lambda: client.submit(layer.W, calibration=calibration),
    ):
        assert refusal(call).code == grpc.StatusCode.UNAVAILABLE
    assert server.metrics().sum("certiq_rejected_total", reason="draining") == 3
    upload.finish()
    assert server.wait() == 0
