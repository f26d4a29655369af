"""Every family of the metrics page, against what the clients of a server saw."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from cluster import JobRequest, refusal
from counted import Counted, Upload, compare, quantized_bytes
from families import COUNTER, FAMILIES, HISTOGRAM, OUTCOMES, family_of
from ledger import Ledger
from programs import Metrics, Server, http_get, wait_until
from raw import Layer, connect
from stubs import certificate_pb2, spec_pb2
from sums import MISMATCHED, Sums, made_up
from work import BIG, CANCELLED, EXPIRED, FAILED, SUCCEEDED, big_job, busy


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
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def server_of(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*flags: str) -> Server:
        servers.append(Server(tmp_path / f"server_{len(servers)}", ["--workers", "1", *flags]))
        return servers[-1]

    yield start
    for started in servers:
        assert started.stop() == 0, started.log()


def layer_of(
    method: int, bits: int, seed: int, *, rows: int = 24, features: int = 48, tokens: int = 300
) -> Layer:
    made = Layer.made_up(rows, features, tokens, seed)
    made.header.spec.method = method
    made.header.spec.bits = bits
    return made


def quantized(client: Counted, layer: Layer) -> certificate_pb2.Certificate:
    found = client.quantize(layer.frames())
    client.ledger.certified(found)
    client.ledger.folded(*layer.X.shape, layer.X.nbytes)
    return found


def test_quantize_calls(server_of: Callable[..., Server], ledger: Ledger) -> None:
    server = server_of()
    before = server.metrics()
    client = Counted(server.address, ledger)
    for seed, (method, bits) in enumerate(
        [
            (spec_pb2.METHOD_OPTQ, 4),
            (spec_pb2.METHOD_OPTQ, 4),
            (spec_pb2.METHOD_OPTQ, 2),
            (spec_pb2.METHOD_NEAREST, 8),
            (spec_pb2.METHOD_QRONOS, 3),
        ]
    ):
        quantized(client, layer_of(method, bits, seed))
    # A dead feature, and weights far outside a grid that was given.
    odd = layer_of(spec_pb2.METHOD_OPTQ, 5, 9)
    odd.X[:, 3] = 0
    odd.header.spec.grid.scales[:] = [0.01] * len(odd.W)
    found = quantized(client, odd)
    assert found.dead_features == 1
    assert found.clipped_weights > 0
    # A ladder on rows that are held out.
    ladder = layer_of(spec_pb2.METHOD_OPTQ, 4, 10, tokens=2048)
    ladder.header.held_out_fraction = 0.25
    ladder.header.spec.damping.held_out.ladder[:] = [0.01, 0.1]
    assert len(quantized(client, ladder).ladder) == 2
    page = compare(ledger, server, before)
    for state in ("queued", "running", *OUTCOMES):
        assert page.sum("certiq_jobs", state=state) == 0
    assert page.sum("certiq_workers") == 1
    assert page.sum("certiq_build_info", isa=found.isa, version=found.engine_version) == 1
    server.wait_idle()


def twins(method: int) -> Layer:
    """Two equal columns."""
    made = layer_of(method, 4, 3)
    made.X[:, 1] = made.X[:, 0]
    return made


def test_failures_of_lambda(server_of: Callable[..., Server], ledger: Ledger) -> None:
    """By method and cause: raised until it stands, given up, rounded to nearest instead."""
    server = server_of()
    before = server.metrics()
    client = Counted(server.address, ledger)
    causes = set()
    for method in (spec_pb2.METHOD_OPTQ, spec_pb2.METHOD_QRONOS):
        raised = twins(method)
        raised.header.spec.damping.relative_trace = 1e-18
        raised.header.spec.damping.max_attempts = 20
        found = quantized(client, raised)
        assert found.lambda_used > found.lambda_requested
        causes |= {attempt.cause for attempt in found.damping_attempts[:-1]}

        fallen = twins(method)
        fallen.header.spec.damping.relative_trace = 1e-18
        fallen.header.spec.damping.max_attempts = 1
        fallen.header.spec.damping.on_failure = spec_pb2.ON_FAILURE_NEAREST
        found = quantized(client, fallen)
        assert found.outcome == certificate_pb2.OUTCOME_FELL_BACK_TO_NEAREST
        cause = found.damping_attempts[0].cause

        given_up = twins(method)
        given_up.header.spec.damping.relative_trace = 1e-18
        given_up.header.spec.damping.max_attempts = 1
        assert client.refused(given_up.frames()) == grpc.StatusCode.FAILED_PRECONDITION
        ledger.job(method, "failed")
        ledger.failed_attempts(method, cause)
        ledger.folded(*given_up.X.shape, given_up.X.nbytes)
    assert causes
    compare(ledger, server, before)


def test_calibrations_and_jobs(
    server_of: Callable[..., Server], ledger: Ledger, tmp_path: Path, random: np.random.Generator
) -> None:
    """All calls of both services; chunks that come twice count once."""
    server = server_of("--data_dir", str(tmp_path / "data"))
    before = server.metrics()
    client = Counted(server.address, ledger)
    features = 48
    calibration = client.create(features, kind=MISMATCHED, labels=["e2e"]).id
    source = made_up(random, "rank-0", 320, features, mismatched=True)
    client.filled(calibration, source)
    # The same stream once more: nothing is left to send.
    client.accumulate(calibration, source)
    half = made_up(random, "rank-1", 64, features, mismatched=True)
    call = client.open(calibration, half)
    call.next()
    for sequence in (0, 0, 1, 1, 0):
        call.send(half.chunk(sequence))
    call.finish()
    ledger.folded(*half.x.shape, half.x.nbytes + quantized_bytes(half))
    client.import_sums(calibration, "sums", Sums.of(half.x, half.x_quantized))
    client.export(calibration)
    client.finalize(calibration)
    client.get(calibration)
    client.calibration_page(10, "", "")

    W = random.standard_normal((24, features)).astype("<f4")
    made = []
    for seed, bits in enumerate((4, 3, 4)):
        request = JobRequest(calibration, W, spec_pb2.QuantizationSpec(bits=bits), f"r-{seed}")
        job = client.create_job(request).id
        assert client.create_job(request).id == job
        assert client.wait_job(job).state == SUCCEEDED
        result = client.read(job)
        assert result.certificate is not None
        # One factor serves all of them.
        factored = len(result.certificate.damping_attempts) if seed == 0 else 0
        ledger.certified(result.certificate, factored=factored)
        ledger.add("certiq_factor_cache_total", result="miss" if seed == 0 else "hit")
        made.append(job)
    client.list_jobs()
    client.delete_job(made.pop())
    page = compare(ledger, server, before)
    assert page.sum("certiq_jobs", state="succeeded") == len(made)
    assert page.sum("certiq_jobs") == len(made)
    assert page.sum("certiq_memory_reserved_bytes") > 0
    client.delete(calibration)
    compare(ledger, server, before)


def test_jobs_that_end_otherwise(
    server_of: Callable[..., Server], ledger: Ledger, random: np.random.Generator
) -> None:
    """Cancelled while it runs and while it waits, expired, failed; and what is busy meanwhile."""
    server = server_of("--queue_limit", "3")
    before = server.metrics()
    client = Counted(server.address, ledger)
    calibration = client.create(32).id
    source = made_up(random, "rank-0", 16, 32)
    client.filled(calibration, source)
    client.finalize(calibration)
    W = random.standard_normal((16, 32)).astype("<f4")
    optq = spec_pb2.METHOD_OPTQ

    blocker = big_job(client)
    with busy(client, blocker) as running:
        cancelled = client.create_job(JobRequest(calibration, W)).id
        expired = client.create_job(JobRequest(calibration, W, deadline=0.2)).id
        page = server.metrics()
        assert page.sum("certiq_jobs", state="running") == 1
        assert page.sum("certiq_jobs", state="queued") == 2
        assert page.sum("certiq_queue_depth") == 2
        assert page.sum("certiq_queue_limit") == 3
        assert page.sum("certiq_workers_busy") == 1
        assert client.cancel_job(cancelled).state == CANCELLED
        ledger.job(optq, "cancelled", ran=False)
        assert client.wait_job(expired).state == EXPIRED
        ledger.job(optq, "expired", ran=False)
        assert client.get_job(running).features == BIG
    ledger.job(optq, "cancelled")
    # Fewer tokens than features, and no damping to make up for it.
    spec = spec_pb2.QuantizationSpec(bits=4)
    spec.damping.absolute = 1e-30
    spec.damping.max_attempts = 2
    failed = client.wait_job(client.create_job(JobRequest(calibration, W, spec)).id)
    assert failed.state == FAILED
    ledger.job(optq, "failed")
    moved = server.metrics()
    failures = "certiq_lambda_stability_failures_total"
    assert moved.sum(failures, method="optq") - before.sum(failures, method="optq") == 2
    for cause in ("pivot", "non_finite", "condition"):
        ledger.add(
            failures, moved.sum(failures, method="optq", cause=cause), method="optq", cause=cause
        )
    # Its factor was made, and kept nowhere, since it failed; the blocker's ladder asked too.
    for result in ("hit", "miss"):
        found = moved.sum("certiq_factor_cache_total", result=result)
        ledger.add("certiq_factor_cache_total", found, result=result)
    page = compare(ledger, server, before)
    assert page.sum("certiq_jobs") == 4
    assert page.sum("certiq_jobs", state="cancelled") == 2


def header_only(layer: Layer) -> list[object]:
    return [layer.header_frame()]


def test_what_is_not_taken_on(
    server_of: Callable[..., Server], ledger: Ledger, tmp_path: Path
) -> None:
    """Every reason, for every kind of work that it stands for."""
    tokens = tmp_path / "tokens"
    tokens.write_text(
        "crowd-token-0123456789 crowd read,write\n"
        "lone-token-0123456789 lone read,write jobs=1 streams=1\n"
    )
    server = server_of(
        *(
            "--token_file",
            str(tokens),
            "--queue_limit",
            "2",
            "--memory_budget_bytes",
            str(128 << 20),
        )
    )
    before = server.metrics()
    client = Counted(server.address, ledger, "crowd-token-0123456789")
    lone = Counted(server.address, ledger, "lone-token-0123456789")

    def rejected(reason: str) -> None:
        ledger.add("certiq_rejected_total", reason=reason)

    wrong = layer_of(spec_pb2.METHOD_OPTQ, 9, 1)
    assert client.refused(header_only(wrong)) == grpc.StatusCode.INVALID_ARGUMENT
    rejected("invalid")
    assert refusal(lambda: client.create(0)).code == grpc.StatusCode.INVALID_ARGUMENT
    rejected("invalid")
    calibration = client.create(32).id
    source = made_up(np.random.default_rng(1), "", 32, 32)
    call = client.open(calibration, source)
    assert call.failure().code == grpc.StatusCode.INVALID_ARGUMENT
    rejected("invalid")

    not_offered = layer_of(spec_pb2.METHOD_OPTQ, 4, 1)
    not_offered.header.spec.polish = 1 << 20
    code = client.refused(header_only(not_offered))
    rejected("not_offered" if code == grpc.StatusCode.UNIMPLEMENTED else "invalid")

    assert refusal(lambda: client.create(8192)).code == grpc.StatusCode.RESOURCE_EXHAUSTED
    rejected("over_budget")
    large = layer_of(spec_pb2.METHOD_OPTQ, 4, 1)
    large.header.weight.shape[:] = [8192, 8192]
    large.header.x.shape[:] = [64, 8192]
    assert client.refused(header_only(large)) == grpc.StatusCode.RESOURCE_EXHAUSTED
    rejected("over_budget")

    # Uploads have the tenant's only place, then all places there are.
    layer = layer_of(spec_pb2.METHOD_OPTQ, 4, 1)
    with connect(server) as channel:
        held = Upload(channel, layer, "lone-token-0123456789", ledger)
        assert lone.refused(header_only(layer)) == grpc.StatusCode.RESOURCE_EXHAUSTED
        rejected("quota")
        own = lone.create(32).id
        stream = lone.open(own, made_up(np.random.default_rng(1), "a", 32, 32))
        stream.next()
        second = lone.open(own, made_up(np.random.default_rng(1), "b", 32, 32))
        assert second.failure().code == grpc.StatusCode.RESOURCE_EXHAUSTED
        rejected("quota")
        stream.finish()
        more = Upload(channel, layer, "crowd-token-0123456789", ledger)
        assert client.refused(header_only(layer)) == grpc.StatusCode.RESOURCE_EXHAUSTED
        rejected("queue_full")
        for upload in (held, more):
            upload.finish()
    compare(ledger, server, before)


def test_a_drain(server_of: Callable[..., Server], ledger: Ledger) -> None:
    server = server_of("--drain_seconds", "100")
    before = server.metrics()
    assert before.sum("certiq_drain_start_time_seconds") == 0
    assert before.sum("certiq_drain_limit_seconds") == 100
    client = Counted(server.address, ledger)
    calibration = client.create(32).id
    layer = layer_of(spec_pb2.METHOD_OPTQ, 4, 1)
    with connect(server) as channel:
        upload = Upload(channel, layer, "", ledger)
        began = time.time()
        server.terminate()
        wait_until(lambda: server.metrics().sum("certiq_drain_start_time_seconds") > 0, "it drains")
        since = server.metrics().sum("certiq_drain_start_time_seconds")
        assert began - 1 <= since <= time.time() + 1
        # Where the server still listens to: every kind of new work.
        assert client.refused([]) == grpc.StatusCode.UNAVAILABLE
        assert refusal(lambda: client.create(32)).code == grpc.StatusCode.UNAVAILABLE
        request = JobRequest(calibration, layer.W, chunk_rows=1 << 20)
        assert refusal(lambda: client.create_job(request)).code == grpc.StatusCode.UNAVAILABLE
        assert server.metrics().sum("certiq_rejected_total", reason="draining") == 3
        upload.finish()
    assert server.wait() == 0
