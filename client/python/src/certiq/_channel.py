"""Connections: the channel, its credentials, and the metadata of every call."""

import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from certiq.errors import FailedPrecondition, InvalidArgument, invalid
from certiq.tensors import MAX_ROW_BYTES

# With the rest of a call's metadata a token has to fit the 8 KiB that servers accept.
_MAX_TOKEN_BYTES = 4096
_LOOPBACK = re.compile(r"127(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}")


@dataclass(frozen=True)
class Tls:
    """Files in PEM, read when a client is made."""

    ca: str | os.PathLike[str] | None = None
    """Authorities to trust; None: the system's."""
    cert: str | os.PathLike[str] | None = None
    """Shown to servers that ask for a certificate; with `key` or not at all."""
    key: str | os.PathLike[str] | None = None
    server_name: str = ""
    """The name that the server's certificate must be for; empty: the address's host."""


@dataclass(frozen=True)
class Connection:
    """A channel, and what goes with every call on it."""

    channel: grpc.Channel
    metadata: tuple[tuple[str, str], ...]
    chunk_bytes: int


def connect(
    address: str,
    tls: Tls | None,
    token: str | None,
    *,
    allow_cleartext: bool,
    connect_timeout: float,
    chunk_bytes: int,
) -> Connection:
    """Does not reach out yet. InvalidArgument where something makes no sense; FailedPrecondition
    for a token that would travel in clear text to another machine."""
    host = _host_of(address)
    if not 1 <= chunk_bytes <= MAX_ROW_BYTES:
        raise invalid("chunk_bytes", f"expected 1 to {MAX_ROW_BYTES}, got {chunk_bytes}")
    if not 0.001 <= connect_timeout <= 3600:
        raise invalid("connect_timeout", f"expected 0.001 to 3600 s, got {connect_timeout}")
    if token is not None:
        _check_token(token)
        if tls is None and not allow_cleartext and not _is_loopback(host):
            raise FailedPrecondition(
                f"token: it would travel to {address} in clear text, for everyone on the way to "
                "read; use tls, or allow_cleartext"
            )
    options = _options(host, tls, connect_timeout)
    if tls is None:
        channel = grpc.insecure_channel(address, options)
    else:
        channel = grpc.secure_channel(address, _credentials(tls), options)
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    return Connection(channel, metadata, chunk_bytes)


def _host_of(address: str) -> str:
    match = re.fullmatch(r"(\[[^\s/\[\]]+\]|[^\s/:\[\]]+):(\d{1,5})", address)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise invalid("address", f'expected HOST:PORT, got "{address}"')
    return match[1].strip("[]")


def _is_loopback(host: str) -> bool:
    """127.a.b.c and nothing that only begins like it: "127.example.com" may be anywhere."""
    return host in ("localhost", "::1") or _LOOPBACK.fullmatch(host) is not None


def _check_token(token: str) -> None:
    # An error message must not repeat the token.
    if not 1 <= len(token) <= _MAX_TOKEN_BYTES or not all("!" <= c <= "~" for c in token):
        raise invalid(
            "token",
            f"expected 1 to {_MAX_TOKEN_BYTES} printable ASCII characters without blanks",
        )


def _options(
    host: str, tls: Tls | None, connect_timeout: float
) -> tuple[tuple[str, int | str], ...]:
    options: list[tuple[str, int | str]] = [
        # Between the tries of a call the channel must be allowed to connect again.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5000),
        ("grpc.min_reconnect_backoff_ms", int(connect_timeout * 1000)),
        # A machine that vanished without a word is noticed. Servers by default punish pings that
        # come more often than every five minutes.
        ("grpc.keepalive_time_ms", 330_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
        # This package retries itself, with limits of its own.
        ("grpc.enable_retries", 0),
    ]
    # A proxy of the environment cannot reach this machine's own servers.
    if _is_loopback(host):
        options.append(("grpc.enable_http_proxy", 0))
    if tls is not None and tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return tuple(options)


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    if (tls.cert is None) != (tls.key is None):
        raise invalid("tls.cert, tls.key", "expected both or none")
    ca = _system_authorities() if tls.ca is None else _read("ca", tls.ca)
    if tls.ca is not None and ca is not None:
        try:
            ssl.create_default_context(cadata=ca.decode("ascii"))
        except (ssl.SSLError, UnicodeDecodeError) as error:
            raise _wrong("ca", tls.ca, "expected certificates in PEM") from error
    cert = key = None
    if tls.cert is not None and tls.key is not None:
        cert, key = _read("cert", tls.cert), _read("key", tls.key)
        try:
            # A key with a password is refused: nobody can be asked for it.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_cert_chain(tls.cert, tls.key, password=lambda: b"")
        except ssl.SSLError as error:
            raise _wrong(
                "key", tls.key, f"expected the unencrypted PEM key of {os.fspath(tls.cert)}"
            ) from error
    return grpc.ssl_channel_credentials(ca, key, cert)


def _read(option: str, path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _wrong(option, path, error.strerror or "cannot read it") from error


def _wrong(option: str, path: str | os.PathLike[str], problem: str) -> InvalidArgument:
    return invalid(f"tls.{option}", f"{os.fspath(path)}: {problem}")


def _system_authorities() -> bytes | None:
    """None where the system has none in one file: gRPC brings its own then."""
    paths = ssl.get_default_verify_paths()
    return Path(paths.cafile).read_bytes() if paths.cafile else None
