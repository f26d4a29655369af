"""TLS and tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import certiq
import pytest
from certificates import Pair, make_authority, make_pair
from programs import Server
from work import weight

ALICE = "alice-secret-token-1"
READER = "reader-secret-token-2"
ONCE = certiq.Retry(max_attempts=1)
W, X = weight(), weight(100)


@dataclass(frozen=True)
class Keys:
    authority: Pair
    stranger: Pair
    server: Pair
    client: Pair


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    authority, stranger = make_authority(folder, "authority"), make_authority(folder, "stranger")
    return Keys(
        authority,
        stranger,
        make_pair(folder, authority, "server", "DNS:elsewhere.example,IP:127.0.0.1"),
        make_pair(folder, authority, "client", "DNS:client"),
    )


@pytest.fixture(scope="module")
def safe_server(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("safe")
    tokens = folder / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text(f"{ALICE} alice read,write\n{READER} reader read\n")
    flags = [*keys.server.flags(), "--token_file", str(tokens)]
    started = Server(folder, [*flags, "--tls_client_ca", str(keys.authority.cert)])
    yield started
    assert started.stop() == 0, started.log()


def tls(keys: Keys) -> certiq.Tls:
    return certiq.Tls(ca=keys.authority.cert, cert=keys.client.cert, key=str(keys.client.key))


def test_tls_and_a_token(safe_server: Server, keys: Keys) -> None:
    with certiq.Client(safe_server.address, tls=tls(keys), token=ALICE) as client:
        assert client.quantize(W, X).shape == W.shape
        # Every kind of call carries the token.
        with client.calibration(X.shape[1]) as calibration:
            with calibration.stream("rank-0") as stream:
                stream.send(X)
            assert calibration.finalize().export_statistics().tokens == len(X)
            assert client.submit(W, calibration=calibration).result().shape == W.shape
            assert len(list(client.jobs())) == 1


def test_scopes_and_wrong_tokens(safe_server: Server, keys: Keys) -> None:
    with certiq.Client(safe_server.address, tls=tls(keys), token=READER) as client:
        assert not list(client.calibrations())
        with pytest.raises(certiq.PermissionDenied):
            client.quantize(W, X)
        with pytest.raises(certiq.PermissionDenied):
            client.calibration(8)
    for token in (None, "somebody-elses-token"):
        with certiq.Client(safe_server.address, tls=tls(keys), token=token) as client:
            with pytest.raises(certiq.Unauthenticated) as caught:
                client.quantize(W, X)
            assert token is None or token not in str(caught.value)


def test_a_server_that_is_somebody_else(safe_server: Server, keys: Keys) -> None:
    host, port = safe_server.address.split(":")
    mine = (keys.client.cert, keys.client.key)
    for address, wrong in (
        (safe_server.address, certiq.Tls(keys.stranger.cert, *mine)),
        (f"localhost:{port}", certiq.Tls(keys.authority.cert, *mine)),
        # No certificate of ours; none of theirs; authorities of the system.
        (safe_server.address, certiq.Tls(keys.authority.cert)),
        (safe_server.address, None),
        (safe_server.address, certiq.Tls(None, *mine)),
    ):
        with (
            certiq.Client(address, tls=wrong, token=ALICE, retry=ONCE) as client,
            pytest.raises(certiq.Unavailable),
        ):
            client.quantize(W, X)
    named = certiq.Tls(keys.authority.cert, *mine, server_name="elsewhere.example")
    with certiq.Client(f"{host}:{port}", tls=named, token=ALICE) as client:
        assert client.quantize(W, X).shape == W.shape


def test_files_that_are_no_certificates(keys: Keys, tmp_path: Path) -> None:
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    missing = tmp_path / "missing.pem"
    cert, key = keys.client.cert, keys.client.key
    for wrong, field, path in (
        (certiq.Tls(ca=text), "tls.ca", text),
        (certiq.Tls(ca=missing), "tls.ca", missing),
        (certiq.Tls(ca=keys.authority.key), "tls.ca", keys.authority.key),
        (certiq.Tls(cert=missing, key=key), "tls.cert", missing),
        (certiq.Tls(cert=cert, key=missing), "tls.key", missing),
        (certiq.Tls(cert=cert, key=keys.server.key), "tls.key", keys.server.key),
        (certiq.Tls(cert=cert, key=text), "tls.key", text),
        (certiq.Tls(cert=cert), "tls.cert, tls.key", ""),
    ):
        with pytest.raises(certiq.InvalidArgument) as caught:
            certiq.Client("localhost:1", tls=wrong)
        assert caught.value.field == field
        assert str(path) in caught.value.message


@pytest.mark.parametrize("host", ["127.example.com", "10.0.0.1", "[2001:db8::1]", "127.0.0.256"])
def test_tokens_stay_on_this_machine(host: str) -> None:
    with pytest.raises(certiq.FailedPrecondition, match="clear text") as caught:
        certiq.Client(f"{host}:8470", token=ALICE)
    assert ALICE not in str(caught.value)
    certiq.Client(f"{host}:8470", token=ALICE, allow_cleartext=True).close()
    certiq.Client(f"{host}:8470", token=ALICE, tls=certiq.Tls()).close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.255.3.4", "[::1]"])
def test_this_machine_needs_no_tls(host: str) -> None:
    certiq.Client(f"{host}:8470", token=ALICE).close()


@pytest.mark.parametrize("token", ["", "two words", "line\n", "x" * 4097, "ümlaut"])
def test_tokens_that_are_none(token: str) -> None:
    with pytest.raises(certiq.InvalidArgument) as caught:
        certiq.Client("localhost:1", token=token)
    assert caught.value.field == "token"
    assert not token or token not in str(caught.value)
