"""HTTP/2 by hand: frames and headers that no client's library would send."""

import select
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterable
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# What both sides have of windows before anybody says otherwise, and the largest frame.
WINDOW = 65_535
FRAME_BYTES = 16_384

END_STREAM = ACK = 1
END_HEADERS = 4

Field = tuple[bytes, bytes]


# Fields that a call must not have, or that a server may refuse.
BAD_HEADERS: dict[str, tuple[Field, ...]] = {
    "base64 that is none": ((b"x-anything-bin", b"!!!!"),),
    "trace that is none": ((b"grpc-trace-bin", b"!!"),),
    "load report": ((b"endpoint-load-metrics-bin", b"x"),),
    "12 KiB": tuple((b"x-p%d" % number, b"p" * 1000) for number in range(12)),
    "25 KiB": tuple((b"x-p%d" % number, b"p" * 1000) for number in range(25)),
    "a thousand": tuple((b"x-p%d" % number, b"") for number in range(1000)),
    "a timeout that is none": ((b"grpc-timeout", b"zz"),),
    "attempts that are none": ((b"grpc-previous-rpc-attempts", b"q"),),
    "upper case": ((b"X-Upper", b"1"),),
    "zero byte": ((b"x-a", b"a\0b"),),
    "line end": ((b"x-a", b"a\r\nb: c"),),
    "no name": ((b"", b"b"),),
    "underscore": ((b"x_a", b"b"),),
    "path twice": ((b":path", b"/elsewhere"),),
    "hop by hop": ((b"connection", b"close"),),
    "length that is not true": ((b"content-length", b"1"),),
}


class Kind(IntEnum):
    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


def length(number: int) -> bytes:
    """HPACK's integer of a prefix of seven bits, as lengths of strings have."""
    if number < 127:
        return bytes([number])
    rest, coded = number - 127, bytearray([127])
    while rest >= 128:
        coded.append(rest % 128 | 128)
        rest //= 128
    return bytes([*coded, rest])


def literal(name: bytes, value: bytes) -> bytes:
    """A field as it is: no table, no Huffman code, no check."""
    return b"\x00" + length(len(name)) + name + length(len(value)) + value


def call_headers(
    path: str, *more: Field, scheme: bytes = b"http", te: bytes = b"trailers"
) -> bytes:
    """The block of a gRPC call."""
    fields: Iterable[Field] = (
        (b":method", b"POST"),
        (b":scheme", scheme),
        (b":path", path.encode()),
        (b":authority", b"localhost"),
        (b"te", te),
        (b"content-type", b"application/grpc"),
        *more,
    )
    return b"".join(literal(name, value) for name, value in fields)


def headers_frames(stream: int, block: bytes, flags: int = 0) -> bytes:
    """A block of any size: HEADERS, and CONTINUATIONs where it takes them."""
    parts = [block[at : at + FRAME_BYTES] for at in range(0, len(block), FRAME_BYTES)] or [b""]
    last = len(parts) - 1
    return b"".join(
        frame(
            Kind.CONTINUATION if number else Kind.HEADERS,
            (END_HEADERS if number == last else 0) | (0 if number else flags),
            stream,
            part,
        )
        for number, part in enumerate(parts)
    )


def grpc_message(payload: bytes, announced: int | None = None) -> bytes:
    """A message's bytes on the wire; a length that is not theirs where one is announced."""
    size = len(payload) if announced is None else announced
    return b"\x00" + size.to_bytes(4, "big") + payload


def http2_context(context: ssl.SSLContext) -> ssl.SSLContext:
    context.set_alpn_protocols(["h2"])
    return context


class Connection:
    """A client's end that keeps windows, and otherwise sends what it is told to.

    One thread uses it: what the other side says is taken in while something is sent or waited for.
    `reads=False` takes in nothing at all; `credit=False` never gives windows back;
    `acknowledges=False` leaves the other side's settings unanswered.
    """

    def __init__(
        self,
        port: int,
        context: ssl.SSLContext | None = None,
        *,
        settings: bytes = b"",
        reads: bool = True,
        credit: bool = True,
        acknowledges: bool = True,
        patience: float = 60.0,
    ) -> None:
        plain = socket.create_connection(("127.0.0.1", port), patience)
        try:
            self._socket = (
                context.wrap_socket(plain, server_hostname="localhost") if context else plain
            )
        except OSError:
            plain.close()
            raise
        self._socket.setblocking(False)
        self._patience = patience
        self._reads = reads
        self._credit = credit
        self._acknowledges = acknowledges
        self._unread = bytearray()
        self._unsent = bytearray()
        self._window = WINDOW
        self._initial = WINDOW
        self._windows: dict[int, int] = {}
        self.closed = False
        # Of the frames that came.
        self.kinds: Counter[int] = Counter()
        # By stream: the headers that ended it as they came, or b"" where it was reset.
        self.ended: dict[int, bytes] = {}
        self.data_bytes = 0
        self.send(PREFACE + frame(Kind.SETTINGS, 0, 0, settings))

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True
        self._socket.close()

    def send(self, data: bytes) -> bool:
        """Whole frames, as they are; False where the connection has ended, or takes no more."""
        self._unsent += data
        return self._flush()

    def open(self, stream: int, block: bytes, *, end: bool = False) -> bool:
        self._windows.setdefault(stream, self._initial)
        return self.send(headers_frames(stream, block, END_STREAM if end else 0))

    def send_data(
        self, stream: int, payload: bytes, *, end: bool = False, patience: float = 5.0
    ) -> int:
        """As much as windows let through, until the stream ends or nothing moves; its bytes."""
        sent = 0
        while sent < len(payload):
            if not self.wait(lambda: self._room(stream) > 0 or stream in self.ended, patience):
                break
            size = min(self._room(stream), FRAME_BYTES, len(payload) - sent)
            if stream in self.ended or size <= 0:
                break
            last = end and sent + size == len(payload)
            part = payload[sent : sent + size]
            if not self.send(frame(Kind.DATA, END_STREAM if last else 0, stream, part)):
                break
            self._window -= size
            self._windows[stream] -= size
            sent += size
        return sent

    def wait(self, condition: Callable[[], bool], patience: float | None = None) -> bool:
        """Takes in what comes until the condition holds; False where it does not in time."""
        end = time.monotonic() + (self._patience if patience is None else patience)
        while not condition():
            left = end - time.monotonic()
            if self.closed or left <= 0:
                return False
            self._take_in(left)
            self._flush()
        return True

    def wait_closed(self, patience: float | None = None) -> bool:
        self.wait(lambda: self.closed, patience)
        return self.closed

    def alive(self) -> bool:
        """It answers a ping."""
        answers = self.kinds[Kind.PING]
        return self.send(frame(Kind.PING, 0, 0, b"\0" * 8)) and self.wait(
            lambda: self.kinds[Kind.PING] > answers
        )

    def _room(self, stream: int) -> int:
        return min(self._window, self._windows[stream])

    def _flush(self) -> bool:
        """Sends what is to be sent. Answers to what comes meanwhile go behind it: what waits here
        begins and ends with a frame."""
        end = time.monotonic() + self._patience
        while self._unsent and not self.closed:
            if self._reads:
                self._take_in(0)
            try:
                with memoryview(self._unsent) as waiting:
                    sent = self._socket.send(waiting[: 1 << 18])
                del self._unsent[:sent]
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
                if time.monotonic() > end:
                    return False
                select.select([self._socket] * self._reads, [self._socket], [], 0.2)
            except OSError:
                self.close()
        return not self.closed

    def _take_in(self, seconds: float) -> None:
        try:
            pending = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()
            if not pending and not select.select([self._socket], [], [], seconds)[0]:
                return
            data = self._socket.recv(1 << 18)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            return
        except (OSError, ValueError):
            self.close()
            return
        if not data:
            self.close()
            return
        self._unread += data
        while len(self._unread) >= 9:
            size = 9 + int.from_bytes(self._unread[:3], "big")
            if len(self._unread) < size:
                break
            head, payload = bytes(self._unread[:9]), bytes(self._unread[9:size])
            del self._unread[:size]
            self._handle(head[3], head[4], int.from_bytes(head[5:9], "big"), payload)

    def _handle(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.kinds[kind] += 1
        if kind == Kind.SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                if payload[at : at + 2] == b"\0\x04":
                    initial = int.from_bytes(payload[at + 2 : at + 6], "big")
                    for known in self._windows:
                        self._windows[known] += initial - self._initial
                    self._initial = initial
            if self._acknowledges:
                self._unsent += frame(Kind.SETTINGS, ACK, 0)
        elif kind == Kind.WINDOW_UPDATE:
            more = int.from_bytes(payload, "big")
            if stream == 0:
                self._window += more
            elif stream in self._windows:
                self._windows[stream] += more
        elif kind == Kind.PING and not flags & ACK:
            self._unsent += frame(Kind.PING, ACK, 0, payload)
        elif kind == Kind.RST_STREAM:
            self.ended.setdefault(stream, b"")
        elif kind == Kind.DATA:
            self.data_bytes += len(payload)
            if self._credit and payload:
                more = len(payload).to_bytes(4, "big")
                for credited in (0, stream):
                    self._unsent += frame(Kind.WINDOW_UPDATE, 0, credited, more)
        if kind in (Kind.HEADERS, Kind.DATA) and flags & END_STREAM:
            self.ended.setdefault(stream, payload)
