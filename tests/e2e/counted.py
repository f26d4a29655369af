"""Clients whose calls are all in a ledger, and the ledger held against a metrics page."""

from collections.abc import Iterable

import grpc
import pytest
from cluster import Client, Pipe, refusal
from families import CLOCKS, FAMILIES, GAUGE, family_of
from ledger import Key, Ledger, key
from programs import Metrics, Server, wait_until
from raw import Layer, collect
from stubs import calibration_pb2_grpc, certificate_pb2, job_pb2_grpc, service_pb2_grpc
from sums import Source


class Counted(Client):
    """One whose calls are all in the ledger."""

    def __init__(self, address: str, ledger: Ledger, token: str = "") -> None:
        super().__init__(address, token)
        self.ledger = ledger
        channel = grpc.intercept_channel(self.channel, ledger)
        self.calibrations = calibration_pb2_grpc.CalibrationServiceStub(channel)
        self.jobs = job_pb2_grpc.JobServiceStub(channel)
        self.quantization = service_pb2_grpc.QuantizationServiceStub(channel)

    def quantize(self, frames: Iterable[object]) -> certificate_pb2.Certificate:
        return collect(self.quantization.Quantize(iter(frames), **self._options)).certificate

    def refused(self, frames: Iterable[object]) -> grpc.StatusCode:
        return refusal(lambda: self.quantize(frames)).code

    def filled(self, calibration: str, source: Source) -> None:
        """Sends all of it, waiting for the answer to the header and reading to the end."""
        self.accumulate(calibration, source)
        self.ledger.folded(*source.x.shape, source.x.nbytes + quantized_bytes(source))


def quantized_bytes(source: Source) -> int:
    return 0 if source.x_quantized is None else source.x_quantized.nbytes


def deltas(before: Metrics, after: Metrics) -> dict[Key, float]:
    """Of every counter and histogram."""
    start = {key(name, **labels): value for name, labels, value in before.samples}
    return {
        key(name, **labels): value - start[key(name, **labels)]
        for name, labels, value in after.samples
        if FAMILIES[family_of(name)].type != GAUGE
    }


def only_clocks_know(sample: Key, ledger: Ledger) -> bool:
    """Sums of seconds and the buckets they fall into, where no certificate tells them."""
    name, labels = sample
    family = family_of(name)
    if family not in CLOCKS or name.endswith("_count"):
        return False
    labelled = (family, frozenset(pair for pair in labels if pair[0] != "le"))
    return labelled not in ledger.observed or labelled in ledger.untimed


def compare(ledger: Ledger, server: Server, before: Metrics) -> Metrics:
    """Every sample of every counter and histogram moved by what the clients saw; the page."""
    handled = sum(
        value for (name, _), value in ledger.expected.items() if name == "grpc_server_handled_total"
    )
    # A call is counted a moment after its client has heard.
    start = before.sum("grpc_server_handled_total")
    wait_until(
        lambda: server.metrics().sum("grpc_server_handled_total") - start >= handled,
        "calls are counted",
    )
    page = server.metrics()
    moved = deltas(before, page)
    expected = ledger.expected + ledger.buckets(page)
    assert [known for known in expected if known not in moved] == []
    wrong = {}
    for sample, value in moved.items():
        known = expected.get(sample, 0)
        if only_clocks_know(sample, ledger):
            assert value >= known
        # Whole numbers are exact; sums of doubles are added up in another order.
        elif value != pytest.approx(known, rel=1e-9, abs=0):
            wrong[sample] = (value, known)
    assert wrong == {}
    return page


class Upload:
    """A Quantize call that has sent its header and waits."""

    def __init__(self, channel: grpc.Channel, layer: Layer, token: str, ledger: Ledger) -> None:
        self._layer, self._ledger, self._pipe = layer, ledger, Pipe()
        self._pipe.send(layer.header_frame())
        stub = service_pb2_grpc.QuantizationServiceStub(grpc.intercept_channel(channel, ledger))
        self._call = stub.Quantize(
            iter(self._pipe), timeout=120, metadata=(("authorization", f"Bearer {token}"),)
        )
        # The header was taken.
        next(self._call)

    def finish(self) -> None:
        for frame in self._layer.frames():
            if not frame.HasField("header"):
                self._pipe.send(frame)
        self._pipe.close()
        self._ledger.certified(collect(self._call).certificate)
        self._ledger.folded(*self._layer.X.shape, self._layer.X.nbytes)
