"""Programs that others wrote, used as deploy/clients.md says: Envoy, grpcurl, ghz."""

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from http2 import BAD_HEADERS, Connection, call_headers
from programs import PATIENCE_SECONDS, ROOT, Server, wait_until
from proxy import ROUTER, Envoy, connection_manager, edge_text
from raw import OPTIONS, AccumulateCall, Calls, Layer, Pipe, Result, collect, connect
from scripts import script
from stubs import QUANTIZATION, calibration_pb2, job_pb2, service_pb2, stub
from sums import Sums, made_up
from work import calibrated, client_of, create

SERVING = health_pb2.HealthCheckResponse.SERVING
GUIDE = ROOT / "deploy" / "clients.md"


@dataclass
class Site:
    """One server with a data directory, two without, and an Envoy in front of all."""

    stateful: Server
    stateless: list[Server]
    envoy: Envoy

    def channel(self) -> grpc.Channel:
        return connect(self.envoy)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    flags = ["--workers", "1", "--drain_seconds", "100"]
    stateful = Server(tmp_path / "stateful", [*flags, "--data_dir", str(tmp_path / "data")])
    stateless = [Server(tmp_path / f"stateless_{number}", flags) for number in range(2)]
    envoy = Envoy(tmp_path / "envoy", stateful.port, [server.port for server in stateless])
    yield Site(stateful, stateless, envoy)
    envoy.close()
    for server in (stateful, *stateless):
        server.stop()


def quantize(channel: grpc.Channel, layer: Layer, **metadata: str) -> Result:
    return collect(
        stub(channel, QUANTIZATION).Quantize(
            layer.frames(),
            timeout=PATIENCE_SECONDS,
            metadata=[(key.replace("_", "-"), value) for key, value in metadata.items()],
        )
    )


def ended(server: Server) -> float:
    return server.metrics().sum("certiq_jobs_total", outcome="succeeded")


def test_envoy_spreads_quantize_and_keeps_the_rest_together(site: Site) -> None:
    layer = Layer.made_up(16, 32, 128)
    with site.channel() as channel, ThreadPoolExecutor(4) as pool:
        calls = 40
        results = list(pool.map(lambda _: quantize(channel, layer), range(calls)))
        # The same bytes, whoever did it.
        assert len({result.tensors["weight"].tobytes() for result in results}) == 1
        assert sum(ended(server) for server in site.stateless) == calls
        assert min(ended(server) for server in site.stateless) > 0
        assert ended(site.stateful) == 0

        client = client_of(site.envoy)
        random = np.random.default_rng(1)
        calibration = calibrated(client, made_up(random, "rank-0", 128, 32))
        job = client.submit(layer.W, calibration=calibration)
        assert job.result().tensors["weight"].shape == layer.W.shape
        assert ended(site.stateful) == 1

        # A layer that names the calibration: who says so reaches the server that has it.
        layer.header.ClearField("x")
        layer.header.calibration_id = calibration.id
        layer.X = layer.X[:0]
        quantize(channel, layer, x_certiq_calibration="yes")
        assert ended(site.stateful) == 2
        with pytest.raises(grpc.RpcError) as failed:
            quantize(channel, layer)
        assert failed.value.code() == grpc.StatusCode.NOT_FOUND


def test_envoy_sends_no_new_calls_to_a_server_that_drains(site: Site) -> None:
    layer = Layer.made_up(16, 32, 128)
    going, staying = site.stateless
    with site.channel() as channel:
        # An upload in two parts keeps the server from ending. Whichever has it is to go.
        pipe = Pipe()
        upload = stub(channel, QUANTIZATION).Quantize(iter(pipe), timeout=PATIENCE_SECONDS)
        frames = list(layer.frames())
        pipe.send(frames[0])
        next(upload)
        if going.metrics().sum("certiq_memory_reserved_bytes") == 0:
            going, staying = staying, going
        before = ended(staying)
        going.terminate()
        wait_until(lambda: going.metrics().sum("certiq_drain_start_time_seconds") > 0, "it drains")
        # Before Envoy has asked for its health again: UNAVAILABLE is tried elsewhere.
        for _ in range(10):
            quantize(channel, layer)
        assert ended(staying) - before == 10
        wait_until(
            lambda: not site.envoy.healthy()["stateless"][going.port], "Envoy knows that it drains"
        )
        for frame in frames[1:]:
            pipe.send(frame)
        pipe.close()
        assert collect(upload).tensors["weight"].shape == layer.W.shape
    assert going.wait() == 0


LIMITS = (
    *("stream_error_on_invalid_http_message", "max_request_headers_kb", "request_headers_timeout"),
    *("stream_idle_timeout", "stream_flush_timeout"),
    *("common_http_protocol_options", "http2_protocol_options"),
)


def test_envoy_has_the_limits_of_the_edge() -> None:
    router, edge = yaml.safe_load(ROUTER.read_text()), yaml.safe_load(edge_text())
    assert router["layered_runtime"] == edge["layered_runtime"]
    for config in (router, edge):
        heap, _ = config["overload_manager"]["resource_monitors"]
        # It keeps what may have to be sent again.
        del heap["typed_config"]["max_heap_size_bytes"]
        for cluster in config["static_resources"]["clusters"]:
            assert cluster["connection_pool_per_downstream_connection"], cluster["name"]
            (options,) = cluster["typed_extension_protocol_options"].values()
            # Connections to servers outlive those of clients for no longer.
            assert options["common_http_protocol_options"] == {"idle_timeout": "0.5s"}
    assert router["overload_manager"] == edge["overload_manager"]
    come_and_go = [
        config["static_resources"]["listeners"][0]["listener_filters"] for config in (router, edge)
    ]
    assert come_and_go[0] == come_and_go[1]
    for limit in LIMITS:
        assert connection_manager(router)[limit] == connection_manager(edge)[limit]


def test_bad_headers_end_nobody_elses_stream(site: Site) -> None:
    """What ends a whole connection of gRPC 1.51 (CVE-2023-32732) ends one of its sender."""
    client, calls = client_of(site.envoy), Calls(site.envoy)
    source = made_up(np.random.default_rng(4), "rank-0", 96, 16)
    calibration = create(client, 16)
    stream = AccumulateCall(calls, calibration, source)
    stream.send(0)
    stream.wait_received(1)
    for fields in BAD_HEADERS.values():
        with Connection(site.envoy.port) as stranger:
            stranger.open(1, call_headers("/certiq.v1.JobService/GetJob", *fields), end=True)
            assert stranger.wait(lambda s=stranger: 1 in s.ended or s.closed)
    stream.send(1, 2)
    assert stream.finish().received == 3
    Sums.exported(calibration).assert_equals(Sums.of(source.x))


def test_envoy_goes_on_where_a_server_was_killed(site: Site) -> None:
    layer = Layer.made_up(16, 32, 128)
    killed, other = site.stateless
    with site.channel() as channel:
        quantize(channel, layer)
        killed.process.kill()
        killed.wait()
        before = ended(other)
        for _ in range(10):
            quantize(channel, layer)
        assert ended(other) - before == 10


# Retries, counted by a server that is never there for anybody.


class Unavailable(grpc.GenericRpcHandler):
    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = details.method
        if not method.startswith("/certiq.v1."):
            return None

        def refuse(_requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            self.asked[method] += 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "for the test")
            yield b""

        return grpc.stream_stream_rpc_method_handler(refuse)


@pytest.fixture
def refuser() -> Iterator[tuple[Unavailable, int]]:
    handler = Unavailable()
    with ThreadPoolExecutor(32) as pool:
        server = grpc.server(pool, handlers=[handler])
        servicer = health.HealthServicer()
        servicer.set("", SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield handler, port
        server.stop(None).wait()


def all_methods() -> list[str]:
    return [
        f"/{service.full_name}/{method.name}"
        for file in (service_pb2, calibration_pb2, job_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


def test_envoy_repeats_only_what_may_be_repeated(
    refuser: tuple[Unavailable, int], tmp_path: Path
) -> None:
    handler, port = refuser
    envoy = Envoy(tmp_path / "envoy", port, [port, port])
    try:
        with grpc.insecure_channel(envoy.address, OPTIONS) as channel:

            def ask(method: str) -> grpc.StatusCode:
                call = channel.unary_unary(method)
                with pytest.raises(grpc.RpcError) as failed:
                    call(b"", timeout=PATIENCE_SECONDS)
                return failed.value.code()

            with ThreadPoolExecutor(16) as pool:
                codes = set(pool.map(ask, all_methods()))
    finally:
        envoy.close()
    assert codes == {grpc.StatusCode.UNAVAILABLE}
    repeated = {
        "Quantize": 3,
        **dict.fromkeys(("GetCalibration", "ListCalibrations", "FinalizeCalibration"), 4),
        **dict.fromkeys(("GetJob", "ListJobs", "CancelJob"), 4),
    }
    assert len(handler.asked) == 16
    assert {name.rpartition("/")[2]: count for name, count in handler.asked.items()} == {
        method.rpartition("/")[2]: repeated.get(method.rpartition("/")[2], 1)
        for method in all_methods()
    }


# Command lines.


@pytest.fixture(scope="session")
def with_clients() -> dict[str, str]:
    """Variables with grpcurl and ghz in PATH; built the first time, which takes minutes."""
    tools = Path(script("tools.sh", "clients", timeout=3000))
    folders = [str(next(tools.glob(f"{program}-*"))) for program in ("grpcurl", "ghz")]
    return os.environ | {"PATH": os.pathsep.join([*folders, os.environ["PATH"]])}


def run(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(
        command,
        env=env,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_walk_with_grpcurl(site: Site, with_clients: dict[str, str]) -> None:
    """Through Envoy, which sends each call where it belongs."""
    said = run(["bash", "deploy/walk.sh", site.envoy.address], with_clients)
    (job_error,) = re.findall(r'"relative_error": (0\.\d+)', said)
    numbers = [float(line) for line in said.splitlines() if re.fullmatch(r"\d+\.\d+", line)]
    # The job's error twice, from its record and its result; the call's error and bound.
    read, error, bound = numbers
    assert read == float(job_error)
    assert 0.01 < error < 0.1
    assert bound > 0
    assert said.count("JOB_STATE_SUCCEEDED") == 3
    assert "certiq.v1.JobService" in said
    assert "spec.bits: expected 2 to 8, got 9" in said
    page = site.stateful.metrics()
    calls = {
        labels["grpc_method"]
        for name, labels, value in page.samples
        if name == "grpc_server_handled_total" and labels["grpc_code"] == "OK" and value > 0
    }
    assert {method.rpartition("/")[2] for method in all_methods()} - calls == {"Quantize"}
    assert "\n768\n" in said, "the tokens that were exported and imported"
    assert sum(ended(server) for server in site.stateless) == 1


def blocks_with(program: str) -> list[str]:
    """Commands of the guide."""
    return [
        block
        for block in re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL)
        if re.search(rf"^ *{program} ", block, re.MULTILINE)
    ]


@pytest.mark.parametrize("program", ["grpcurl", "ghz"])
def test_commands_of_the_guide(
    site: Site, with_clients: dict[str, str], tmp_path: Path, program: str
) -> None:
    blocks = blocks_with(program)
    assert blocks
    env = with_clients | {"CERTIQ": site.envoy.address, "TMPDIR": str(tmp_path)}
    for block in blocks:
        said = run(["bash", "-euo", "pipefail", "-c", block], env)
        if program == "ghz":
            assert re.search(r"\[OK\]\s+40 responses", said), said
