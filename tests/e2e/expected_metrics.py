"""Samples of a metrics page that must follow from what clients saw."""

from collections import Counter
from collections.abc import Iterator

import certiq
import grpc
import pytest
from families import CLOCKS, FAMILIES, GAUGE, family_of
from programs import Metrics, Server, wait_until
from raw import Calls, connect
from stubs import certificate_pb2, spec_pb2
from work import client_of

Key = tuple[str, frozenset[tuple[str, str]]]

METHODS = {
    spec_pb2.METHOD_NEAREST: "nearest",
    spec_pb2.METHOD_OPTQ: "optq",
    spec_pb2.METHOD_QRONOS: "qronos",
}
CAUSES = {
    certificate_pb2.STABILITY_CAUSE_PIVOT: "pivot",
    certificate_pb2.STABILITY_CAUSE_NON_FINITE: "non_finite",
    certificate_pb2.STABILITY_CAUSE_CONDITION: "condition",
}
PHASES = ("factor", "round", "certify", "reference", "pack")
# As go-grpc-prometheus spells them.
CODES = {code: code.name.title().replace("_", "") for code in grpc.StatusCode} | {
    grpc.StatusCode.OK: "OK",
    grpc.StatusCode.CANCELLED: "Canceled",
}


def key(name: str, **labels: str) -> Key:
    return name, frozenset(labels.items())


class ExpectedMetrics(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Counts the calls of the channels it intercepts, and what it is told of jobs."""

    def __init__(self) -> None:
        self.values: Counter[Key] = Counter()
        # Histograms that got observations of a known value.
        self.observed: dict[Key, list[float]] = {}
        # Those where some values are not known: of jobs without a certificate.
        self.untimed: set[Key] = set()

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        self.values[key(name, **labels)] += value

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.add(f"{name}_count", **labels)
        self.add(f"{name}_sum", value, **labels)
        self.observed.setdefault(key(name, **labels), []).append(value)

    # Calls.

    def intercept_unary_unary(self, continuation, details, request):  # noqa: ANN001, ANN201
        return self._answered(details, "unary", continuation(details, self._sent(details, request)))

    def intercept_stream_unary(self, continuation, details, requests):  # noqa: ANN001, ANN201
        counted = self._each_sent(details, "client_stream", requests)
        return self._answered(details, "client_stream", continuation(details, counted))

    def intercept_unary_stream(self, continuation, details, request):  # noqa: ANN001, ANN201
        request = self._sent(details, request, "server_stream")
        return Answers(self, details, "server_stream", continuation(details, request))

    def intercept_stream_stream(self, continuation, details, requests):  # noqa: ANN001, ANN201
        counted = self._each_sent(details, "bidi_stream", requests)
        return Answers(self, details, "bidi_stream", continuation(details, counted))

    def call(self, family: str, details: grpc.ClientCallDetails, kind: str, **more: str) -> None:
        _, service, method = details.method.split("/")
        self.add(family, grpc_service=service, grpc_method=method, grpc_type=kind, **more)

    def ended(self, details: grpc.ClientCallDetails, kind: str, code: grpc.StatusCode) -> None:
        self.call("grpc_server_started_total", details, kind)
        self.call("grpc_server_handled_total", details, kind, grpc_code=CODES[code])
        self.call("grpc_server_handling_seconds_count", details, kind)

    def _sent(
        self, details: grpc.ClientCallDetails, request: object, kind: str = "unary"
    ) -> object:
        self.call("grpc_server_msg_received_total", details, kind)
        return request

    def _each_sent(
        self, details: grpc.ClientCallDetails, kind: str, requests: Iterator[object]
    ) -> Iterator[object]:
        for request in requests:
            yield self._sent(details, request, kind)

    def _answered(self, details: grpc.ClientCallDetails, kind: str, call: grpc.Call) -> grpc.Call:
        if call.code() == grpc.StatusCode.OK:
            self.call("grpc_server_msg_sent_total", details, kind)
        self.ended(details, kind, call.code())
        return call

    # Jobs.

    def job(self, method: int, outcome: str, *, ran: bool = True) -> None:
        labels = {"method": METHODS[method], "outcome": outcome}
        self.add("certiq_jobs_total", **labels)
        self.add("certiq_job_duration_seconds_count", **labels)
        if ran:
            phase = {"method": METHODS[method], "phase": "queue"}
            self.add("certiq_job_seconds_count", **phase)
            self.untimed.add(key("certiq_job_seconds", **phase))

    def failed_attempts(self, method: int, *causes: int) -> None:
        for cause in causes:
            self.add(
                "certiq_lambda_stability_failures_total",
                method=METHODS[method],
                cause=CAUSES[cause],
            )

    def certified(self, found: certificate_pb2.Certificate, *, factored: int | None = None) -> None:
        """A layer that succeeded. `factored`: how often, where that is not once an attempt."""
        method, bits = METHODS[found.method], str(found.bits)
        self.job(found.method, "succeeded", ran=False)
        for phase in ("queue", *PHASES):
            took = getattr(found.phase_seconds, phase)
            self.observe("certiq_job_seconds", took, method=method, phase=phase)
        attempts = found.damping_attempts
        self.failed_attempts(found.method, *(a.cause for a in attempts if a.cause in CAUSES))
        n = found.features
        if factored is None:
            factored = len(attempts) + len(found.ladder)
        self.add("certiq_flops_total", factored * n**3 / 3, phase="factor")
        fell_back = found.outcome == certificate_pb2.OUTCOME_FELL_BACK_TO_NEAREST
        if fell_back:
            self.add("certiq_lambda_fallbacks_total", method=method)
        elif found.method != spec_pb2.METHOD_NEAREST:
            rows = found.rows + len(found.ladder) * found.held_out_rows
            self.add("certiq_flops_total", rows * n**2, phase="round")
            self.observe("certiq_lambda_ratio", found.lambda_used / found.lambda_requested)
        self.add("certiq_weights_quantized_total", found.rows * n, method=method, bits=bits)
        self.observe("certiq_relative_error", found.relative_error, method=method, bits=bits)
        tightness = found.damped_squared_error**0.5 / found.l2_bound
        self.observe("certiq_bound_tightness", tightness, method=method, bits=bits)
        self.add("certiq_clipped_weights_total", found.clipped_weights)
        self.add("certiq_dead_features_total", found.dead_features)

    def folded(self, rows: int, features: int, data_bytes: int) -> None:
        self.add("certiq_activation_rows_total", rows)
        self.add("certiq_activation_bytes_total", data_bytes)
        self.add("certiq_flops_total", rows * features**2, phase="statistics")

    # What must be on the page.

    def buckets(self, page: Metrics) -> Counter[Key]:
        """Expected counts of the buckets of observations whose values are known."""
        found: Counter[Key] = Counter()
        for name, labels, _ in page.samples:
            bounded = dict(labels)
            bound = bounded.pop("le", None)
            if bound is None:
                continue
            values = self.observed.get(key(name.removesuffix("_bucket"), **bounded), [])
            found[key(name, **labels)] = sum(value <= float(bound) for value in values)
        return found


class Answers:
    """Answers of a call as they come; counts them."""

    def __init__(
        self, expected: ExpectedMetrics, details: grpc.ClientCallDetails, kind: str, call: grpc.Call
    ) -> None:
        self._expected, self._details, self._kind = expected, details, kind
        self._call = call

    def __iter__(self) -> "Answers":
        return self

    def __next__(self) -> object:
        try:
            answer = next(self._call)
        except StopIteration:
            self._expected.ended(self._details, self._kind, grpc.StatusCode.OK)
            raise
        except grpc.RpcError as error:
            self._expected.ended(self._details, self._kind, error.code())
            raise
        self._expected.call("grpc_server_msg_sent_total", self._details, self._kind)
        return answer

    def __getattr__(self, name: str) -> object:
        return getattr(self._call, name)


def counted_client(
    server: Server, expected: ExpectedMetrics, token: str | None = None
) -> certiq.Client:
    """A client of the package, all of whose calls are counted. wait() and watch() must not be
    used: they leave a call as soon as they know enough, and the server ends it either way."""
    client = client_of(server, token)
    transport = client._core.transport
    transport._channel = grpc.intercept_channel(transport._channel, expected)
    return client


def counted_calls(server: Server, expected: ExpectedMetrics) -> Calls:
    """The same for calls of our own."""
    return Calls(server, grpc.intercept_channel(connect(server), expected))


def deltas(before: Metrics, after: Metrics) -> dict[Key, float]:
    """By how much every sample of a counter or histogram moved."""
    start = {key(name, **labels): value for name, labels, value in before.samples}
    return {
        key(name, **labels): value - start[key(name, **labels)]
        for name, labels, value in after.samples
        if FAMILIES[family_of(name)].type != GAUGE
    }


def only_clocks_know(sample: Key, expected: ExpectedMetrics) -> bool:
    """Sums of seconds and the buckets they fall into, where no certificate tells them."""
    name, labels = sample
    family = family_of(name)
    if family not in CLOCKS or name.endswith("_count"):
        return False
    labelled = (family, frozenset(pair for pair in labels if pair[0] != "le"))
    return labelled not in expected.observed or labelled in expected.untimed


def compare(expected: ExpectedMetrics, server: Server, before: Metrics) -> Metrics:
    """Every sample of every counter and histogram moved by what the clients saw; the page."""
    handled = sum(
        value for (name, _), value in expected.values.items() if name == "grpc_server_handled_total"
    )
    # A call is counted a moment after its client has heard.
    start = before.sum("grpc_server_handled_total")
    wait_until(
        lambda: server.metrics().sum("grpc_server_handled_total") - start >= handled,
        "calls are counted",
    )
    page = server.metrics()
    moved = deltas(before, page)
    values = expected.values + expected.buckets(page)
    assert [known for known in values if known not in moved] == []
    wrong = {}
    for sample, value in moved.items():
        known = values.get(sample, 0)
        if only_clocks_know(sample, expected):
            assert value >= known
        # Whole numbers are exact; sums of doubles are added up in another order.
        elif value != pytest.approx(known, rel=1e-9, abs=0):
            wrong[sample] = (value, known)
    assert wrong == {}
    return page
