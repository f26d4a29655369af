"""TLS and tokens, by the two programs and by raw connections."""

import hashlib
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from certificates import Pair, make_authority, make_pair
from conftest import StartServer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from http2 import Connection, Kind, call_headers
from programs import PATIENCE_SECONDS, Server, certiq, http_get, run_server, wait_until
from raw import OPTIONS, connect, failure, quantize
from verification import Layer

ALICE = "alice-secret-token-1"
READER = "reader-secret-token-2"
NOBODY = "nobody-secret-token-3"
TOKENS = f"""# comment
{ALICE} tenant-alice read,write jobs=4

sha256:{hashlib.sha256(READER.encode()).hexdigest()} tenant-reader read
"""


@dataclass(frozen=True)
class Keys:
    folder: Path
    authority: Pair
    stranger: Pair
    server: Pair
    # For a name that is not that of this machine.
    elsewhere: Pair
    client: Pair
    stranger_client: Pair
    tokens: Path

    def file(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text)
        return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    authority, stranger = make_authority(folder, "authority"), make_authority(folder, "stranger")
    here = "DNS:localhost,IP:127.0.0.1"
    made = Keys(
        folder,
        authority,
        stranger,
        server=make_pair(folder, authority, "server", here),
        elsewhere=make_pair(folder, authority, "elsewhere", "DNS:elsewhere.example"),
        client=make_pair(folder, authority, "client", "DNS:client"),
        stranger_client=make_pair(folder, stranger, "stranger_client", "DNS:client"),
        tokens=folder / "tokens",
    )
    made.file("tokens", TOKENS)
    for name, token in (("alice", ALICE), ("reader", READER), ("nobody", NOBODY)):
        made.file(name, token + "\n")
    return made


def send(
    server: Server, layer: Layer, *flags: str | Path, env: dict[str, str] | None = None
) -> tuple[int, str]:
    done = certiq(
        *("quantize", "--server", server.address, *layer.flags(), "--bits", "4"),
        *map(str, flags),
        env=env,
    )
    for token in (ALICE, READER, NOBODY):
        assert token not in done.stdout + done.stderr
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def safe_server(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """TLS and tokens. Its log holds no token when it ends."""
    folder = tmp_path_factory.mktemp("safe_server")
    started = Server(folder, [*keys.server.flags(), "--token_file", str(keys.tokens)])
    yield started
    assert started.stop() == 0, started.log()
    assert "secret" not in started.log()


def trusting(keys: Keys) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(keys.authority.cert.read_bytes())


def test_tls_and_a_token(safe_server: Server, keys: Keys, carried_layer: Layer) -> None:
    tls = ("--tls_ca", keys.authority.cert)
    status, errors = send(safe_server, carried_layer, *tls, "--token_file", keys.folder / "alice")
    assert status == 0, errors
    status, errors = send(safe_server, carried_layer, *tls, env={"CERTIQ_TOKEN": ALICE})
    assert status == 0, errors
    assert "tenant=tenant-alice" in safe_server.log()
    page = http_get(safe_server.metrics_port, "/metrics").text
    assert "tenant-alice" not in page
    assert "secret" not in page


@pytest.mark.parametrize(
    ("token", "code"),
    [(None, "UNAUTHENTICATED"), ("nobody", "UNAUTHENTICATED"), ("reader", "PERMISSION_DENIED")],
)
def test_tokens_that_do_not_do(
    safe_server: Server, keys: Keys, carried_layer: Layer, token: str | None, code: str
) -> None:
    flags = [] if token is None else ["--token_file", keys.folder / token]
    status, errors = send(safe_server, carried_layer, "--tls_ca", keys.authority.cert, *flags)
    assert status == 1
    assert code in errors
    assert "advice" in errors


def test_a_server_that_cannot_be_trusted(
    safe_server: Server, keys: Keys, carried_layer: Layer
) -> None:
    alice = ("--token_file", keys.folder / "alice")
    for tls in (["--tls_ca", keys.stranger.cert], ["--tls"]):
        status, errors = send(safe_server, carried_layer, *tls, *alice)
        assert status == 1
        assert "UNAVAILABLE" in errors
    other_name = ("--tls_ca", keys.authority.cert, "--tls_server_name", "elsewhere.example")
    assert send(safe_server, carried_layer, *other_name, *alice)[0] == 1
    # In clear text.
    status, errors = send(safe_server, carried_layer, *alice)
    assert status == 1
    assert "TLS" in errors


def test_a_server_of_another_name(
    start_server: StartServer, keys: Keys, carried_layer: Layer
) -> None:
    server = start_server(*keys.elsewhere.flags())
    tls = ("--tls_ca", keys.authority.cert)
    assert send(server, carried_layer, *tls)[0] == 1
    assert send(server, carried_layer, *tls, "--tls_server_name", "elsewhere.example")[0] == 0
    # The probe knows the certificate itself.
    probe = run_server("--probe", "--listen", server.address, *keys.elsewhere.flags())
    assert probe.returncode == 0, probe.stderr


def test_client_certificates(start_server: StartServer, keys: Keys, carried_layer: Layer) -> None:
    authorities = ["--tls_client_ca", str(keys.authority.cert)]
    server = start_server(*keys.server.flags(), *authorities)
    tls = ("--tls_ca", keys.authority.cert)
    assert send(server, carried_layer, *tls, *keys.client.flags())[0] == 0
    assert send(server, carried_layer, *tls)[0] == 1
    assert send(server, carried_layer, *tls, *keys.stranger_client.flags())[0] == 1
    probe = ["--probe", "--listen", server.address]
    done = run_server(*probe, *keys.server.flags(), *authorities)
    assert done.returncode == 0, done.stderr


def test_authorities_that_go_let_nobody_in(
    start_server: StartServer, keys: Keys, carried_layer: Layer, tmp_path: Path
) -> None:
    """An emptied or broken file of authorities fails closed, and a good one opens again."""
    file = tmp_path / "ca.pem"
    good = keys.authority.cert.read_text()
    file.write_text(good)
    server = start_server(*keys.server.flags(), "--tls_client_ca", str(file))
    tls = ("--tls_ca", keys.authority.cert)

    def works(*identity: str | Path) -> bool:
        return send(server, carried_layer, *tls, *identity)[0] == 0

    assert works(*keys.client.flags())
    assert not works()
    for bad in ("", "no certificate\n"):
        file.write_text(bad)
        wait_until(lambda: not works(*keys.client.flags()), "nobody is let in")
        # A second later gRPC has read the file too, which would let everyone in.
        for _ in range(3):
            assert not works()
            assert not works(*keys.stranger_client.flags())
            time.sleep(0.5)
        assert "new connections are turned away" in server.log()
        file.write_text(good)
        wait_until(lambda: works(*keys.client.flags()), "clients are let in again")
        assert not works()


def test_probe_with_tls(safe_server: Server, keys: Keys) -> None:
    """No token is asked for."""
    probe = ["--probe", "--listen", safe_server.address]
    assert run_server(*probe, *keys.server.flags()).returncode == 0
    env = {"CERTIQ_TLS_CERT": str(keys.server.cert), "CERTIQ_TLS_KEY": str(keys.server.key)}
    assert run_server(*probe, env=env).returncode == 0
    for flags in ([], keys.elsewhere.flags(), keys.server.flags()[:2]):
        done = run_server(*probe, *flags)
        assert done.returncode == 1
        assert done.stderr


def test_health_and_reflection_are_open(safe_server: Server, keys: Keys) -> None:
    with grpc.secure_channel(safe_server.address, trusting(keys), OPTIONS) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([request]))
        assert answer.list_services_response.service


def test_refused_before_anything_is_read(safe_server: Server, keys: Keys) -> None:
    before = safe_server.metrics().sum("grpc_server_msg_received_total")
    with grpc.secure_channel(safe_server.address, trusting(keys), OPTIONS) as channel:
        assert failure(quantize(channel, [])).code == grpc.StatusCode.UNAUTHENTICATED
    assert safe_server.metrics().sum("grpc_server_msg_received_total") == before


def test_old_versions_of_tls_are_refused(safe_server: Server) -> None:
    def shake(*flags: str) -> str:
        done = subprocess.run(
            ["openssl", "s_client", "-connect", safe_server.address, "-alpn", "h2", *flags],
            input="",
            capture_output=True,
            text=True,
            # Frames of HTTP/2 follow.
            errors="replace",
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        return done.stdout + done.stderr

    assert re.search(r"Protocol *: TLSv1.2|New, TLSv1.2", shake("-tls1_2"))
    assert "New, TLSv1.3" in shake("-tls1_3")
    assert "no peer certificate" in shake("-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0")
    # The client did offer it.
    wait_until(lambda: "unsupported protocol" in safe_server.log(), "the server says why")


@pytest.mark.parametrize(
    "values",
    [
        [b"Bearer \x00\xff\x80\n\x1b[31m"],
        [b""],
        [b"Bearer " + ALICE.encode() + b"\r\nx: y"],
        [b"Bearer " + ALICE.encode(), b"Bearer " + ALICE.encode()],
        [b"Bearer x"] * 60,
    ],
    ids=["binary", "empty", "split", "twice", "many"],
)
def test_hostile_headers(start_server: StartServer, keys: Keys, values: list[bytes]) -> None:
    """HTTP/2 by hand: clients' libraries refuse to send these."""
    server = start_server("--token_file", str(keys.tokens))
    block = call_headers(
        "/certiq.v1.QuantizationService/Quantize",
        *((b"authorization", value) for value in values),
    )
    with Connection(server.port) as connection:
        connection.open(1, block)
        assert connection.wait(lambda: 1 in connection.ended or connection.kinds[Kind.GOAWAY] > 0)
    with connect(server) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    server.wait_idle()
    assert server.metrics().sum("grpc_server_handled_total", grpc_code="OK") == 0
    assert server.metrics().sum("grpc_server_msg_received_total") == 0
    assert server.stop() == 0
    assert "secret" not in server.log()


def test_new_tokens_and_certificates_while_it_runs(
    start_server: StartServer, keys: Keys, carried_layer: Layer, tmp_path: Path
) -> None:
    """As Kubernetes does it: a symlink to a folder is swapped."""

    def write(version: str, pair: Pair, tokens: str) -> None:
        folder = tmp_path / version
        folder.mkdir()
        (folder / "tls.crt").write_bytes(pair.cert.read_bytes())
        (folder / "tls.key").write_bytes(pair.key.read_bytes())
        (folder / "tokens").write_text(tokens)
        (tmp_path / "..data.new").symlink_to(version)
        (tmp_path / "..data.new").rename(tmp_path / "..data")

    write("1", keys.server, TOKENS)
    for name in ("tls.crt", "tls.key", "tokens"):
        (tmp_path / name).symlink_to(Path("..data") / name)
    mounted = Pair(tmp_path / "tls.crt", tmp_path / "tls.key")
    server = start_server(*mounted.flags(), "--token_file", str(tmp_path / "tokens"))

    def works(authority: Pair, token: str) -> bool:
        flags = ("--tls_ca", authority.cert, "--token_file", keys.folder / token)
        return send(server, carried_layer, *flags)[0] == 0

    assert works(keys.authority, "alice")
    assert not works(keys.authority, "nobody")
    # The tokens may be seen by everyone: said once, at the start.
    assert server.log().count("chmod") == 2

    new_pair = make_pair(tmp_path, keys.stranger, "new", "DNS:localhost,IP:127.0.0.1")
    write("2", new_pair, f"{NOBODY} tenant-new write\n")
    shown = ("127.0.0.1", server.port)
    new_cert = new_pair.cert.read_text().strip()
    wait_until(
        lambda: ssl.get_server_certificate(shown).strip() == new_cert, "the new certificate is used"
    )
    wait_until(lambda: works(keys.stranger, "nobody"), "the new token is known")
    assert not works(keys.stranger, "alice")
    assert not works(keys.authority, "nobody")

    (tmp_path / "2" / "tokens").write_text("broken secret file\n")
    assert works(keys.stranger, "nobody")
    wait_until(
        lambda: works(keys.stranger, "nobody") and "stay valid" in server.log(), "the file is tried"
    )
    assert server.stop() == 0
    assert "secret" not in server.log()


def test_files_that_stop_the_start(keys: Keys) -> None:
    garbage = keys.file("garbage", "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n")
    tokens = keys.file("bad_tokens", f"{ALICE} tenant read\n{READER} tenant secret-scope\n")
    missing = keys.folder / "missing"
    server = keys.server
    cases: list[tuple[list[str | Path], list[str | Path]]] = [
        (["--tls_cert", server.cert], ["--tls_cert", "--tls_key"]),
        (["--tls_key", server.key], ["--tls_cert", "--tls_key"]),
        (["--tls_client_ca", server.cert], ["--tls_client_ca", "--tls_cert"]),
        (["--tls_cert", missing, "--tls_key", server.key], ["--tls_cert", missing]),
        (["--tls_cert", garbage, "--tls_key", server.key], ["--tls_cert", garbage]),
        (["--tls_cert", server.cert, "--tls_key", garbage], ["--tls_key", garbage]),
        (["--tls_cert", server.cert, "--tls_key", keys.client.key], ["--tls_key", server.cert]),
        ([*server.flags(), "--tls_client_ca", garbage], ["--tls_client_ca", garbage]),
        (["--token_file", missing], ["--token_file", missing]),
        (["--token_file", tokens], ["--token_file", tokens, "line 2", "scopes"]),
    ]
    for flags, words in cases:
        done = run_server(
            *("--listen", "127.0.0.1:0", "--metrics_listen", "127.0.0.1:0"), *map(str, flags)
        )
        assert done.returncode == 1, flags
        for word in words:
            assert str(word) in done.stderr, (flags, done.stderr)
        assert "secret" not in done.stderr


def test_beyond_loopback(start_server: StartServer, keys: Keys) -> None:
    """TLS needs no leave; who lets everyone in, or tokens travel in clear text, is warned."""
    tokens = ["--token_file", str(keys.tokens)]
    safe = start_server("--listen", "0.0.0.0:0", *keys.server.flags(), *tokens)
    assert "warning" not in safe.log()
    open_to_all = start_server("--listen", "0.0.0.0:0", *keys.server.flags())
    assert "everyone is let in" in open_to_all.log()
    refused = run_server("--listen", "0.0.0.0:0", "--metrics_listen", "127.0.0.1:0", *tokens)
    assert refused.returncode == 1
    assert "--allow_cleartext" in refused.stderr
    server = start_server("--listen", "0.0.0.0:0", "--allow_cleartext", *tokens)
    assert "tokens travel" in server.log()


def test_the_client_keeps_its_token_from_the_wire(keys: Keys, carried_layer: Layer) -> None:
    # TEST-NET-1; nothing is sent.
    quantize_far = ("quantize", "--server", "192.0.2.1:1", *carried_layer.flags())
    for done in (
        certiq(*quantize_far, "--token_file", str(keys.folder / "alice")),
        certiq(*quantize_far, env={"CERTIQ_TOKEN": ALICE}),
    ):
        assert done.returncode == 1
        assert "clear text" in done.stderr
        assert "secret" not in done.stderr


def test_the_clients_files(safe_server: Server, keys: Keys, carried_layer: Layer) -> None:
    garbage = keys.file("client_garbage", "x")
    empty = keys.file("client_empty", "")
    alice = ("--token_file", keys.folder / "alice")
    for flags, word in (
        (["--tls_ca", garbage, *alice], garbage),
        (["--tls_cert", garbage, "--tls_key", keys.client.key, *alice], garbage),
        (["--tls_cert", keys.client.cert, "--tls_key", garbage, *alice], garbage),
        (["--tls_ca", keys.authority.cert, "--token_file", empty], empty),
        (["--tls_ca", keys.authority.cert, "--token_file", keys.folder], keys.folder),
    ):
        status, errors = send(safe_server, carried_layer, *flags)
        assert status == 1
        assert str(word) in errors
    assert send(safe_server, carried_layer, "--tls_cert", keys.client.cert)[0] == 2
