"""Services that refuse, break off and lie, over loopback."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from certiq._methods import Method
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

Behaviour = Callable[[Any, grpc.ServicerContext], Any]

_KINDS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
_STREAMS_IN = {"Quantize", "CreateJob", "Accumulate", "ImportStatistics"}
_STREAMS_OUT = {"Quantize", "Accumulate", "WatchJob", "ReadResult", "ExportStatistics"}


@contextmanager
def serving(behaviours: dict[Method[Any, Any], Behaviour]) -> Iterator[str]:
    """The address of a server that behaves like this."""
    server = grpc.server(ThreadPoolExecutor(8))
    for method, behaviour in behaviours.items():
        _, service, name = method.path.split("/")
        handler = _KINDS[name in _STREAMS_IN, name in _STREAMS_OUT](
            behaviour,
            method.request.FromString,
            lambda message: message.SerializeToString(),
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {name: handler}),)
        )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def refuse(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    message: str = "no",
    retry_delay: float | None = None,
) -> None:
    """Ends the call like this."""
    if retry_delay is not None:
        status = status_pb2.Status(code=code.value[0], message=message)
        packed = any_pb2.Any()
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(int(retry_delay * 1e9))
        packed.Pack(info)
        status.details.append(packed)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, message)
