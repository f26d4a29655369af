"""The constructor that the blocking and the asynchronous client share."""

from typing import ClassVar

from certiq._aio_transport import AioTransport
from certiq._channel import Tls, connect
from certiq._core import Core
from certiq._transport import BlockingTransport
from certiq.retry import Retry

CHUNK_BYTES = 2 << 20


class ClientBase:
    _transport: ClassVar[type[BlockingTransport] | type[AioTransport]]

    def __init__(
        self,
        address: str,
        *,
        tls: Tls | None = None,
        token: str | None = None,
        allow_cleartext: bool = False,
        retry: Retry | None = None,
        connect_timeout: float = 5.0,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """`address` is HOST:PORT. Without `tls` the connection is in clear text, and a token goes
        to this machine only, unless `allow_cleartext`. `connect_timeout` is for one attempt;
        `chunk_bytes` are those of tensors in a message, a row that is larger travels alone."""
        connection = connect(
            address,
            tls,
            token,
            allow_cleartext=allow_cleartext,
            connect_timeout=connect_timeout,
            chunk_bytes=chunk_bytes,
        )
        transport = self._transport(connection.channel, connection.metadata)
        self._core = Core(transport, retry or Retry(), connection.chunk_bytes)
