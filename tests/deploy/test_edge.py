"""What the edge lets through, to whom it says who calls, and that it leaves long streams alone."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import certiq
import grpc
import numpy as np
import pytest
import yaml
from exposed import MIB, TOKEN, Keys, Memory, Site, Tenant
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from programs import PATIENCE_SECONDS, ROOT, SERVER, environment, run_server, wait_until
from programs import certiq as run_certiq
from proxy import (
    EDGE,
    SECRETS,
    Config,
    Edge,
    connection_manager,
    edge_text,
    over_socket,
    program,
)
from raw import ONCE, OPTIONS, bearer, refusal
from stubs import calibration_pb2, job_pb2, service_pb2
from sums import Sums, made_up
from verification import Layer as CarriedLayer
from work import create, small

METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in (service_pb2, calibration_pb2, job_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
FINALIZE = "/certiq.v1.CalibrationService/FinalizeCalibration"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def site(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"), keys)
    yield made
    made.close()


# Who calls: TLS and client certificates end at the edge.


@dataclass
class Echo:
    """In the server's place, and says what metadata reached it."""

    edge: Edge
    keys: Keys

    def ask(self, shown: object, *metadata: tuple[str, str]) -> dict[str, list[str]]:
        credentials = self.keys.credentials(shown)
        with grpc.secure_channel(f"localhost:{self.edge.port}", credentials, OPTIONS) as channel:
            call = channel.unary_unary("/certiq.v1.JobService/GetJob")
            return json.loads(call(b"", metadata=metadata, timeout=PATIENCE_SECONDS))


class SaysWhatItHeard(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        heard: dict[str, list[str]] = {}
        for key, value in details.invocation_metadata:
            heard.setdefault(key, []).append(value)
        return grpc.unary_unary_rpc_method_handler(lambda *_: json.dumps(heard).encode())


@pytest.fixture(params=["tokens", "client_certificates"])
def echo(request: pytest.FixtureRequest, keys: Keys, tmp_path: Path) -> Iterator[Echo]:
    authority = keys.authority.cert if request.param == "client_certificates" else None
    edge = Edge(tmp_path / "edge", keys.server, authority)
    server = grpc.server(ThreadPoolExecutor(2), handlers=[SaysWhatItHeard()])
    server.add_insecure_port(f"unix:{edge.server_socket}")
    server.start()
    yield Echo(edge, keys)
    edge.close()
    server.stop(None).wait()


FORGED = (
    ("x-forwarded-client-cert", 'Subject="CN=somebody-else";URI=spiffe://somebody/else'),
    ("x-forwarded-for", "192.0.2.1"),
    ("x-envoy-upstream-rq-timeout-ms", "1"),
    ("x-envoy-original-path", "/elsewhere"),
)


def test_identity_is_the_edges_to_say(echo: Echo, request: pytest.FixtureRequest) -> None:
    certified = "client_certificates" in request.node.name
    shown = echo.keys.client if certified else None
    for metadata in ((), FORGED):
        heard = echo.ask(shown, ("authorization", f"Bearer {TOKEN}"), *metadata)
        # Tokens are the server's to judge.
        assert heard["authorization"] == [f"Bearer {TOKEN}"]
        assert "192.0.2.1" not in ",".join(heard.get("x-forwarded-for", [])).split(",")[-1]
        assert not {"x-envoy-upstream-rq-timeout-ms", "x-envoy-original-path"} & heard.keys()
        if certified:
            (said,) = heard["x-forwarded-client-cert"]
            assert "CN=trainer" in said
            assert "DNS=trainer.example" in said
            assert "somebody" not in said
        else:
            assert "x-forwarded-client-cert" not in heard


def test_strangers_end_at_the_handshake(keys: Keys, tmp_path: Path) -> None:
    """Where client certificates are asked for, the server never hears of who has none."""
    site = Site(tmp_path, keys, client_ca=True)
    try:
        with site.channel(keys.client) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest()).status
        for shown in (None, keys.stranger):
            with site.channel(shown) as channel, pytest.raises(grpc.RpcError) as failed:
                channel.unary_unary("/certiq.v1.JobService/GetJob")(b"", timeout=PATIENCE_SECONDS)
            assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
        assert site.edge.stats("cluster.server.upstream_cx_total") == {
            "cluster.server.upstream_cx_total": 1
        }
    finally:
        site.close()


def test_a_renewed_certificate_is_shown_without_a_restart(site: Site, keys: Keys) -> None:
    def shown() -> str:
        return ssl.get_server_certificate(("127.0.0.1", site.edge.port)).strip()

    before = keys.server.cert.read_text().strip()
    assert shown() == before
    tenant = Tenant(site)
    site.edge.show(keys.client)
    wait_until(lambda: shown() == keys.client.cert.read_text().strip(), "the new one is shown")
    # What is open stays.
    tenant.works(anew=False)
    site.edge.show(keys.server)
    wait_until(lambda: shown() == before, "the first one is shown again")
    tenant.finish()


def test_clear_text_and_old_tls_are_refused(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.edge.port), 60) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            # Nothing, or an alert of TLS.
            assert plain.recv(100)[:2] in (b"", b"\x15\x03")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(site.keys.authority.cert)
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", site.edge.port), 60) as plain,
        pytest.raises(ssl.SSLError, match="VERSION"),
    ):
        old.wrap_socket(plain, server_hostname="localhost")


# What passes.


def routed(path: str) -> tuple[str, int | None]:
    """The cluster, or the status, of a path; how large a request of it may be."""
    manager = connection_manager(yaml.safe_load(edge_text()))
    (host,) = manager["route_config"]["virtual_hosts"]
    (limit,) = (
        one["typed_config"]["max_request_bytes"]
        for one in manager["http_filters"]
        if one["name"] == "envoy.filters.http.buffer"
    )
    for route in host["routes"]:
        match = route["match"]
        if (
            match.get("path") == path
            or ("prefix" in match and path.startswith(match["prefix"]))
            or ("safe_regex" in match and re.fullmatch(match["safe_regex"]["regex"], path))
        ):
            own = route.get("typed_per_filter_config", {}).get("envoy.filters.http.buffer", {})
            limit = (
                None
                if own.get("disabled")
                else own.get("buffer", {}).get("max_request_bytes", limit)
            )
            if "route" in route:
                assert route["route"]["timeout"] == "0s"
                return route["route"]["cluster"], limit
            return str(route["direct_response"]["status"]), limit
    raise AssertionError(path)


@pytest.mark.parametrize("path", METHODS)
def test_each_method_passes_as_its_requests_are(path: str) -> None:
    """Streams of requests as they come; single requests once they are whole."""
    cluster, limit = routed(path)
    assert cluster == "server"
    assert (limit is None) == METHODS[path].client_streaming


def test_a_walk_through_the_api(site: Site) -> None:
    """Calls of both clients, with the results that there should be."""
    client = site.client()
    request = small(client)
    job = client.submit(**request)
    states = [progress.state for progress in job.watch()]
    assert states[-1] == "succeeded"
    layer = job.result()
    assert layer.tensors["weight"].shape == request["weight"].shape
    token = site.folder / "my_token"
    token.write_text(TOKEN + "\n")
    data = ROOT / "tests" / "data"
    carried = CarriedLayer(
        *(data / "weights.safetensors", "encoder.layer.3.attention.output.dense.weight"),
        *(data / "activations.safetensors", "layer.3.attn_out.x"),
    )
    done = run_certiq(
        *("quantize", "--server", site.address, *carried.flags(), "--bits", "4"),
        *("--tls_ca", str(site.keys.authority.cert), "--token_file", str(token)),
    )
    assert done.returncode == 0, done.stderr
    again = client.submit(**request)
    assert again.result().tensors["weight"].tobytes() == layer.tensors["weight"].tobytes()
    assert {one.id for one in client.jobs()} >= {job.id, again.id}


def test_only_health_is_open(site: Site) -> None:
    with site.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        # Streams that take no token, and that nobody has to end.
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]),
            timeout=PATIENCE_SECONDS,
        )
        for stream in (watch, reflection):
            with pytest.raises(grpc.RpcError) as failed:
                next(stream)
            assert failed.value.code() == grpc.StatusCode.UNIMPLEMENTED
        nothing = channel.unary_unary("/certiq.v1.JobService/GetJob")
        assert refusal(lambda: nothing(b"", timeout=60)).code == grpc.StatusCode.UNAUTHENTICATED


def test_sixty_thousand_names_of_streams_fit(site: Site) -> None:
    """The largest of the single requests, of names as ranks have them."""
    client = site.client()
    calibration = create(client, 8)
    Sums.of(np.eye(8)).import_into(calibration, "there")
    names = [f"rank-{number}" for number in range(60_000)]
    failed = refusal(lambda: calibration.finalize(expected_streams=names))
    assert failed.code == grpc.StatusCode.FAILED_PRECONDITION


# Long and large.


def test_large_streams_pass_and_are_not_kept(site: Site) -> None:
    """Messages of almost 16 MiB, 240 MiB in all: no more than windows of them is in the edge."""
    client = site.client(chunk_bytes=15 * MIB)
    features = 1024
    rows = 15 * MIB // (4 * features)
    source = made_up(np.random.default_rng(3), "large", rows, features, chunk_rows=rows)
    calibration = create(client, features)
    memory = Memory(site)
    with calibration.stream("large", chunk_rows=rows) as stream:
        for _ in range(16):
            stream.send(source.x)
    assert calibration.refresh().tokens == 16 * rows
    grown = memory.grown()["edge"]
    assert grown < 32 * MIB, grown
    exported = Sums.exported(calibration)
    exact = Sums.of(source.x)
    assert exported.tokens == 16 * exact.tokens
    np.testing.assert_array_equal(exported.parts[0], 16 * exact.parts[0])


DURATION = re.compile(r"(\d+(?:\.\d+)?)s")
FASTER = 40.0


def hurried(config: Any) -> Any:  # noqa: ANN401
    """Every duration there is, divided."""
    if isinstance(config, dict):
        # gRPC hangs up on who pings oftener than every ten seconds; the other has a least value.
        return {
            key: value if key in ("connection_keepalive", "token_bucket") else hurried(value)
            for key, value in config.items()
        }
    if isinstance(config, list):
        return [hurried(one) for one in config]
    if isinstance(config, str) and (found := DURATION.fullmatch(config)):
        return f"{float(found[1]) / FASTER:.6f}s"
    return config


def test_silent_streams_stay_and_silent_connections_go(keys: Keys, tmp_path: Path) -> None:
    """In a time that runs faster: what must not end for hours does not end for minutes."""

    def change(config: Config) -> None:
        # Envoy's own limits where nothing is said; they are minutes.
        manager = connection_manager(config)
        assert manager["stream_idle_timeout"] == "0s"
        assert "max_stream_duration" not in manager["common_http_protocol_options"]
        config["static_resources"] = hurried(config["static_resources"])

    site = Site(tmp_path, keys, change=change)
    try:
        tenant = Tenant(site)
        manager = connection_manager(yaml.safe_load(edge_text()))
        idle = manager["common_http_protocol_options"]["idle_timeout"]
        idle_seconds = float(DURATION.fullmatch(idle)[1]) / FASTER
        with site.stranger() as connection:
            assert connection.alive()
            end = time.monotonic() + 4 * idle_seconds
            assert connection.wait_closed(PATIENCE_SECONDS)
            while time.monotonic() < end:
                time.sleep(0.1)
        tenant.send()
        tenant.finish()
    finally:
        site.close()


def test_a_server_that_was_killed_is_found_again(keys: Keys, tmp_path: Path) -> None:
    """Its socket's file is still there; meanwhile calls end UNAVAILABLE, to be tried again. The
    probe, which the chart has the kubelet make over that socket, tells the difference."""
    site = Site(tmp_path, keys)
    try:
        client = site.client()
        assert list(client.jobs()) == []
        probe = ("--probe", "--listen", f"unix:{site.edge.server_socket}")
        assert run_server(*probe).returncode == 0
        site.server.process.kill()
        site.server.wait()
        assert site.edge.server_socket.exists()
        assert refusal(lambda: list(client.jobs())).code == grpc.StatusCode.UNAVAILABLE
        assert run_server(*probe).returncode == 1
        site.start_server()
        assert run_server(*probe).returncode == 0
        # With the retries that clients have.
        tls = certiq.Tls(ca=keys.authority.cert)
        with certiq.Client(site.address, token=TOKEN, tls=tls) as patient:
            assert list(patient.jobs()) == []
    finally:
        site.close()


def test_envoys_own_page_is_for_its_user(site: Site) -> None:
    assert site.edge.admin_socket.is_socket()
    assert site.edge.admin_socket.stat().st_mode & 0o777 == 0o600
    page = json.loads(over_socket(site.edge.admin_socket, "listeners?format=json"))
    listeners = page["listener_statuses"]
    assert [one["name"] for one in listeners] == ["edge"]


def test_a_call_with_a_token_of_8_kib_is_answered(site: Site) -> None:
    """gRPC's limit comes before that of the connection: the call ends and no other."""
    tenant = Tenant(site)
    with site.channel() as channel:
        call = channel.unary_unary("/certiq.v1.JobService/GetJob")
        for size in (5_000, 9_000, 20_000):
            metadata = bearer("x" * size)
            failed = refusal(lambda m=metadata: call(b"", metadata=m, timeout=PATIENCE_SECONDS))
            assert failed.code != grpc.StatusCode.DEADLINE_EXCEEDED
    tenant.works()
    tenant.finish()


# The guide.


@pytest.mark.parametrize("certified", [False, True], ids=["tokens", "client_certificates"])
def test_the_commands_of_the_guide(keys: Keys, tmp_path: Path, certified: bool) -> None:
    """As they stand there; only folders and the port are others."""
    section = (ROOT / "deploy" / "security.md").read_text().partition("## The edge")[2]
    prepare_and_start, ask_for_certificates = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[:2]
    prepare, server, start = prepare_and_start.partition("certiq-server ")
    sockets = Path(tempfile.mkdtemp(prefix="certiq-"))
    here = {
        "/run/certiq": sockets,
        "/etc/certiq": tmp_path / "etc",
        "/var/lib/certiq": tmp_path / "data",
    }
    moved = {"0.0.0.0": "127.0.0.1", "port_value: 8470": "port_value: 0"}

    def changed(text: str) -> str:
        for words, others in (here | moved).items():
            text = text.replace(words, str(others))
        return text

    (tmp_path / "deploy" / "envoy").mkdir(parents=True)
    for file in (EDGE, *SECRETS):
        (tmp_path / "deploy" / "envoy" / file.name).write_text(changed(file.read_text()))
    for name, file in (("server", keys.server), ("ca", keys.authority)):
        (tmp_path / f"{name}.pem").write_bytes(file.cert.read_bytes())
        (tmp_path / f"{name}.key").write_bytes(file.key.read_bytes())
    (tmp_path / "tokens").write_text(f"{TOKEN} tenant read,write\n")
    programs = f"{Path(program()).parent}:{SERVER.parent}:{os.environ['PATH']}"
    settings = {"PATH": programs, "CERTIQ_METRICS_LISTEN": "127.0.0.1:0"}
    script = prepare + ask_for_certificates * certified + server + start + "wait\n"
    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", changed(script)],
            cwd=tmp_path,
            env=environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        admin = sockets / "edge-admin.sock"

        def listening() -> list[int]:
            assert running.poll() is None, (tmp_path / "log").read_text()
            try:
                found = json.loads(over_socket(admin, "listeners?format=json"))
            except OSError:
                return []
            statuses = found.get("listener_statuses", [])
            return [one["local_address"]["socket_address"]["port_value"] for one in statuses]

        wait_until(lambda: bool(listening()) and (sockets / "server.sock").exists(), "both listen")
        (port,) = listening()
        mine = {"cert": keys.client.cert, "key": keys.client.key} if certified else {}
        tls = certiq.Tls(ca=keys.authority.cert, **mine)
        with certiq.Client(f"localhost:{port}", token=TOKEN, tls=tls) as client:
            assert list(client.jobs()) == []
        if certified:
            tls = certiq.Tls(ca=keys.authority.cert)
            with certiq.Client(f"localhost:{port}", token=TOKEN, tls=tls, retry=ONCE) as client:
                assert refusal(lambda: list(client.jobs())).code == grpc.StatusCode.UNAVAILABLE
    finally:
        os.killpg(running.pid, signal.SIGTERM)
        running.wait()
        shutil.rmtree(sockets)
