"""The server from outside: start, health, reflection, metrics, drain, end."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from conftest import Quantizer, Settings, StartServer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from programs import PATIENCE_SECONDS, Server, http_get, run_server, wait_until
from raw import Layer as RawLayer
from raw import collect, connect, failure, quantize, weight_frame
from stubs import service_pb2
from verification import Layer

SERVICE = "certiq.v1.QuantizationService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(channel: grpc.Channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service)).status


def test_health(server: Server) -> None:
    with connect(server) as channel:
        assert health(channel) == SERVING
        assert health(channel, SERVICE) == SERVING
        with pytest.raises(grpc.RpcError) as error:
            health(channel, "no.such.Service")
        assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(server: Server) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with connect(server) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([request]))
    names = {service.name for service in answer.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


def test_healthz_and_unknown_pages(server: Server) -> None:
    assert http_get(server.metrics_port, "/healthz").status == 200
    assert http_get(server.metrics_port, "/nothing").status == 404


def test_labels_carry_no_names_of_clients(
    start_server: StartServer, quantizer: Quantizer, carried_layer: Layer
) -> None:
    server = start_server()
    quantizer.run(server, carried_layer, Settings())
    assert carried_layer.weight not in http_get(server.metrics_port, "/metrics").text


def test_probe(start_server: StartServer) -> None:
    server = start_server()
    assert run_server("--probe", "--listen", server.address).returncode == 0
    address = server.address
    assert server.stop() == 0
    gone = run_server("--probe", "--listen", address)
    assert gone.returncode == 1
    assert gone.stderr


def test_flags_come_from_the_environment_too(tmp_path: Path) -> None:
    """Flags win over the environment."""
    env = {
        "CERTIQ_LISTEN": "127.0.0.1:0",
        "CERTIQ_METRICS_LISTEN": "127.0.0.1:0",
        "CERTIQ_PORT_FILE": str(tmp_path / "port"),
        "CERTIQ_DATA_DIR": "",
        "CERTIQ_WORKERS": "3",
        "CERTIQ_QUEUE_LIMIT": "11",
        "CERTIQ_LOG_FORMAT": "json",
    }
    server = Server(tmp_path, ["--queue_limit", "12"], env, embedded_defaults=False)
    try:
        assert server.metrics().sum("certiq_workers") == 3
        assert server.metrics().sum("certiq_queue_limit") == 12
        lines = server.log().splitlines()
        assert lines
        assert all(line.startswith("{") and line.endswith("}") for line in lines)
    finally:
        assert server.stop() == 0


def test_port_files_hold_a_number_on_a_line(server: Server) -> None:
    assert server.port_file.read_text() == f"{server.port}\n"
    assert server.metrics_port_file.read_text() == f"{server.metrics_port}\n"


def test_memory_only_is_said_at_the_start(server: Server) -> None:
    assert "memory" in server.log()


def test_clear_text_beyond_loopback_has_to_be_allowed(start_server: StartServer) -> None:
    refused = run_server("--listen", "0.0.0.0:0", "--metrics_listen", "127.0.0.1:0")
    assert refused.returncode not in (0, None)
    assert "allow_cleartext" in refused.stderr + refused.stdout
    server = start_server("--listen", "0.0.0.0:0", "--allow_cleartext")
    with connect(server) as channel:
        assert health(channel) == SERVING


@pytest.mark.parametrize(
    "flags",
    [
        ["--no_such_flag"],
        ["--workers", "0"],
        ["--workers", "many"],
        ["--queue_limit", "0"],
        ["--memory_budget_bytes", "-1"],
        ["--log_format", "xml"],
        ["--listen", "nonsense"],
        ["--listen", "127.0.0.1:99999"],
        ["--drain_seconds", "-1"],
    ],
    ids="".join,
)
def test_flags_that_make_no_sense(flags: list[str]) -> None:
    base = ["--metrics_listen", "127.0.0.1:0"]
    if "--listen" not in flags:
        base += ["--listen", "127.0.0.1:0"]
    done = run_server(*base, *flags)
    assert done.returncode not in (0, -6, -11)
    assert flags[0].removeprefix("--") in done.stderr + done.stdout


@pytest.mark.parametrize("which", ["--listen", "--metrics_listen"])
def test_an_address_that_is_taken(which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = {"--listen": "127.0.0.1:0", "--metrics_listen": "127.0.0.1:0", which: address}
        done = run_server(*(word for flag in flags.items() for word in flag))
    assert done.returncode not in (0, -6, -11)
    assert address in done.stderr + done.stdout


def test_version_and_help() -> None:
    done = run_server("--help")
    assert done.returncode == 0
    for flag in (
        *("listen", "metrics_listen", "data_dir", "workers", "queue_limit", "tls_cert", "tls_key"),
        *("memory_budget_bytes", "tls_client_ca", "token_file", "drain_seconds", "log_format"),
        *("port_file", "allow_cleartext", "probe", "accept_loss"),
    ):
        assert f"--{flag}" in done.stdout, flag


# The end.


def test_an_idle_server_ends_when_told(start_server: StartServer) -> None:
    server = start_server()
    server.terminate()
    assert server.wait() == 0


def test_draining_finishes_what_was_begun(start_server: StartServer) -> None:
    server = start_server("--drain_seconds", "100")
    layer = RawLayer.made_up(32, 64, 128)
    go_on = threading.Event()

    def in_two_parts() -> Iterator[service_pb2.QuantizeRequest]:
        yield layer.header_frame()
        yield weight_frame(0, layer.W[:16].tobytes())
        go_on.wait(PATIENCE_SECONDS)
        yield weight_frame(16, layer.W[16:].tobytes())
        yield from layer.activation_frames()

    with connect(server) as channel:
        assert health(channel) == SERVING
        call = quantize(channel, in_two_parts())
        wait_until(
            lambda: server.metrics().sum("certiq_memory_reserved_bytes") > 0, "the header arrives"
        )
        server.terminate()
        wait_until(lambda: health(channel) == NOT_SERVING, "the server drains")
        assert http_get(server.metrics_port, "/healthz").status == 503
        assert failure(quantize(channel, layer.frames())).code == grpc.StatusCode.UNAVAILABLE
        assert server.process.poll() is None
        go_on.set()
        result = collect(call)
        assert result.tensors["weight"].shape == layer.W.shape
    assert server.wait() == 0


def test_a_drain_ends_even_if_a_client_does_not(start_server: StartServer) -> None:
    server = start_server("--drain_seconds", "0.5")
    layer = RawLayer.made_up(32, 64, 128)
    ended = threading.Event()

    def stalled() -> Iterator[service_pb2.QuantizeRequest]:
        yield layer.header_frame()
        ended.wait(PATIENCE_SECONDS)

    with connect(server) as channel:
        call = quantize(channel, stalled())
        wait_until(
            lambda: server.metrics().sum("certiq_memory_reserved_bytes") > 0, "the header arrives"
        )
        server.terminate()
        assert failure(call).code == grpc.StatusCode.UNAVAILABLE
        ended.set()
    assert server.wait() == 0


def test_a_drain_that_is_over_ends_running_jobs(start_server: StartServer) -> None:
    server = start_server("--drain_seconds", "0", "--workers", "1")
    with connect(server) as channel:
        call = quantize(channel, RawLayer.made_up(3072, 3072, 32).frames())
        for frame in call:
            if frame.progress.phase == service_pb2.PHASE_FACTOR:
                break
        server.terminate()
        assert failure(call).code == grpc.StatusCode.UNAVAILABLE
    assert server.wait() == 0
