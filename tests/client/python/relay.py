"""A TCP relay before a server, to cut connections with."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

PIECE = 64 << 10


class Relay:
    """Hands bytes on to 127.0.0.1:port of `target`, until it cuts."""

    def __init__(self, target: Callable[[], int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        # Bytes until the cut, by direction.
        self._budget: dict[str, int] = {}
        self.connections = 0
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """All connections there are; new ones are taken."""
        with self._lock:
            self.cuts += 1
            sockets, self._open = self._open, set()
        for connection in sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def cut_after(self, count: int, direction: str = "to server") -> None:
        """Once so many more bytes have gone there: "to server" or "to client"."""
        with self._lock:
            self._budget[direction] = count

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target()))
            except OSError:
                client.close()
                continue
            with self._lock:
                self.connections += 1
                self._open |= {client, server}
            for pump in ((client, server, "to server"), (server, client, "to client")):
                threading.Thread(target=self._pump, args=pump, daemon=True).start()

    def _spend(self, count: int, direction: str) -> bool:
        """Whether it is time to cut."""
        with self._lock:
            if direction not in self._budget:
                return False
            self._budget[direction] -= count
            if self._budget[direction] > 0:
                return False
            del self._budget[direction]
            return True

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        with suppress(OSError):
            while data := source.recv(PIECE):
                if self._spend(len(data), direction):
                    self.cut()
                    return
                sink.sendall(data)
        for connection in (source, sink):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
