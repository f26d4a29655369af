"""A server where strangers can reach it, behind the edge, and a tenant who is at work there."""

import os
import resource
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import certiq
import grpc
import numpy as np
from certificates import Pair, make_authority, make_pair
from http2 import Connection, http2_context
from programs import PATIENCE_SECONDS, Server
from proxy import Config, Edge, forget_peak, memory_bytes
from raw import OPTIONS, AccumulateCall, Calls, Layer, bearer, collect
from sums import Source, Sums, made_up
from work import client_of, create

TOKEN = "tenant-secret-token-1"
MIB = 1 << 20
# What an attack may cost each of both processes, and each of its connections there.
SPARE_BYTES = 64 * MIB
CONNECTION_BYTES = MIB


@dataclass(frozen=True)
class Keys:
    authority: Pair
    server: Pair
    client: Pair
    stranger: Pair

    @staticmethod
    def make(folder: Path) -> "Keys":
        authority = make_authority(folder, "authority")
        other = make_authority(folder, "other")
        return Keys(
            authority,
            server=make_pair(folder, authority, "server", "DNS:localhost,IP:127.0.0.1"),
            client=make_pair(folder, authority, "trainer", "DNS:trainer.example"),
            stranger=make_pair(folder, other, "stranger", "DNS:trainer.example"),
        )

    def credentials(self, shown: Pair | None = None) -> grpc.ChannelCredentials:
        mine = (shown.key.read_bytes(), shown.cert.read_bytes()) if shown else (None, None)
        return grpc.ssl_channel_credentials(self.authority.cert.read_bytes(), *mine)

    def context(self) -> ssl.SSLContext:
        """Of a stranger, who has no certificate."""
        return http2_context(ssl.create_default_context(cafile=str(self.authority.cert)))


class Site:
    """A certiq-server that listens on a unix socket only, and the edge."""

    def __init__(
        self,
        folder: Path,
        keys: Keys,
        *,
        flags: tuple[str, ...] = (),
        client_ca: bool = False,
        change: Callable[[Config], object] | None = None,
    ) -> None:
        self.keys = keys
        self.folder = folder
        self._tokens = folder / "tokens"
        self._tokens.parent.mkdir(parents=True, exist_ok=True)
        self._tokens.touch(mode=0o600)
        self._tokens.write_text(f"{TOKEN} tenant read,write\n")
        self._flags = flags
        self._lives = 0
        authority = keys.authority.cert if client_ca else None
        self.edge = Edge(folder / "edge", keys.server, authority, change)
        self.start_server()
        self.context = keys.context()

    def start_server(self) -> None:
        self._lives += 1
        self.server = Server(
            self.folder / f"server_{self._lives}",
            [
                *("--listen", f"unix:{self.edge.server_socket}", "--workers", "2"),
                *("--token_file", str(self._tokens), *self._flags),
            ],
        )

    @property
    def address(self) -> str:
        # By the name in the certificate.
        return f"localhost:{self.edge.port}"

    def channel(self, shown: Pair | None = None) -> grpc.Channel:
        return grpc.secure_channel(self.address, self.keys.credentials(shown), OPTIONS)

    def client(self, **options: Any) -> certiq.Client:  # noqa: ANN401
        tls = certiq.Tls(ca=self.keys.authority.cert)
        return client_of(self, token=TOKEN, tls=tls, **options)

    def stranger(self, **options: Any) -> Connection:  # noqa: ANN401
        """Someone without a token."""
        return Connection(self.edge.port, self.context, **options)

    def close(self) -> None:
        try:
            self.edge.close()
        finally:
            self.server.stop()


@dataclass
class Tenant:
    """Has a stream open and rows left to send."""

    site: Site
    features: int = 32
    sent: int = 0
    calibration: certiq.Calibration = field(init=False)

    def __post_init__(self) -> None:
        self._client = self.site.client()
        self._channel = self.site.channel()
        random = np.random.default_rng(5)
        self._source: Source = made_up(random, "rank-0", 2048, self.features, chunk_rows=8)
        self.calibration = create(self._client, self.features)
        self._call = AccumulateCall(
            Calls(self.site, self._channel),
            self.calibration,
            self._source,
            TOKEN,
            timeout=5 * PATIENCE_SECONDS,
        )
        self._call.next()
        self._layer = Layer.made_up(16, 32, 128)
        self._expected = self._quantize(self._channel).tobytes()
        self.send()

    def _quantize(self, channel: grpc.Channel) -> np.ndarray:
        calls = Calls(self.site, channel)
        answer = calls.quantization.Quantize(
            self._layer.frames(),
            timeout=PATIENCE_SECONDS,
            metadata=bearer(TOKEN),
            # Connects again where it was turned away.
            wait_for_ready=True,
        )
        return collect(answer).tensors["weight"]

    def send(self) -> None:
        """One more chunk of the open stream, whose arrival is waited for."""
        self._call.send(self.sent)
        self.sent += 1
        self._call.wait_received(self.sent)

    def works(self, *, anew: bool = True) -> None:
        """The stream goes on; a call on its connection, and on a new one, has the right result."""
        self.send()
        assert self._quantize(self._channel).tobytes() == self._expected
        if anew:
            with self.site.channel() as channel:
                assert self._quantize(channel).tobytes() == self._expected

    def finish(self) -> None:
        """Not a row of the stream was lost or counted twice."""
        self._call.send(*range(self.sent, self._source.chunks))
        end = self._call.finish()
        assert end.received == self._source.chunks
        Sums.exported(self.calibration).assert_equals(Sums.of(self._source.x))
        self._channel.close()


class Memory:
    """What both processes take at most from now on, above what they take now."""

    def __init__(self, site: Site) -> None:
        self._pids = {"edge": site.edge.process.pid, "server": site.server.process.pid}
        self._before = {name: memory_bytes(pid) for name, pid in self._pids.items()}
        for pid in self._pids.values():
            forget_peak(pid)

    def grown(self) -> dict[str, int]:
        return {
            name: memory_bytes(pid, "VmHWM") - self._before[name]
            for name, pid in self._pids.items()
        }

    def assert_bounded(self, connections: int, server_bytes: int = 0) -> None:
        """`server_bytes`: what the server is known to keep besides."""
        grown = self.grown()
        print("grown by MiB:", {name: round(one / MIB, 1) for name, one in grown.items()})
        limit = SPARE_BYTES + connections * CONNECTION_BYTES
        assert grown["edge"] <= limit, grown
        assert grown["server"] <= limit + server_bytes, grown


def may_open(files: int) -> None:
    """More connections than a shell's processes may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(files, 1024), hard), hard))


def limit_files(process: int, files: int) -> None:
    resource.prlimit(process, resource.RLIMIT_NOFILE, (files, files))


def open_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))  # noqa: PTH208
