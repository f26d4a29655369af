"""One request, sent as a Quantize call, as a job, and by the Python package: one answer.

A row of a table is a request; what is compared is the status, its message, every detail, and when
it comes: what is wrong with a header is said before a byte of a tensor was sent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import certiq
import numpy as np
import pytest
from answers import (
    CALIBRATED,
    CREATE_JOB,
    EVERY,
    FEATURES,
    HEADER_SECONDS,
    ON_THE_WIRE,
    QUANTIZE,
    QUANTIZE_X,
    ROWS,
    TOKENS,
    WITH_X,
    Answer,
    Caller,
    Request,
    answered,
    begun,
    check_same,
    weights,
)
from bad_headers import (
    BAD,
    EXHAUSTED,
    GPTQ,
    INVALID,
    NEAREST,
    NOT_FOUND,
    PACKED,
    PISO,
    PRECONDITION,
    STOCHASTIC,
    UNIMPLEMENTED,
    Change,
    both,
    damping_with,
    grid_with,
    ladder,
    set_field,
    set_weight,
    spec_with,
)
from conftest import StartServer
from programs import Server, wait_until
from raw import collect
from stubs import job_pb2, service_pb2, spec_pb2
from sums import held_out_rows, made_up
from work import calibrated, create, fill

S = spec_pb2


@dataclass(frozen=True)
class Calibrations:
    """128 tokens of 32 features each, but for what the names say."""

    plain: str
    held_out: str
    open: str
    other_features: str

    @staticmethod
    def made(client: certiq.Client) -> "Calibrations":
        random = np.random.default_rng(3)
        source = made_up(random, "rank-0", 128, FEATURES)
        still_open = create(client, FEATURES)
        fill(still_open, source)
        held_out = calibrated(client, source, held_out_fraction=0.25, sequence_rows=8)
        return Calibrations(
            plain=calibrated(client, source).id,
            held_out=held_out.id,
            open=still_open.id,
            other_features=calibrated(client, made_up(random, "rank-0", 64, 24)).id,
        )


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("same_answers"), ["--workers", "2"])
    yield started
    assert started.stop() == 0, started.log()


@pytest.fixture(scope="module")
def caller(serving: Server) -> Caller:
    return Caller(serving)


@pytest.fixture(scope="module")
def calibrations(caller: Caller) -> Calibrations:
    return Calibrations.made(caller.client)


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_header(caller: Caller, calibrations: Calibrations, name: str) -> None:
    bad = BAD[name]
    answers = {}
    for way in bad.ways:
        request = Request(calibrations.plain)
        bad.change(request)
        answers[way] = caller.at_header(way, request)
    answer = check_same(answers, text=bad.text)
    assert answer.code in ((bad.code,) if bad.code else (INVALID, UNIMPLEMENTED)), answer
    assert answer.fields == [bad.field]
    assert (answer.preconditions, answer.retry) == ((), False)
    assert answer.message.startswith(f"{bad.field}: ")


# Calibrations that do not serve.


@pytest.mark.parametrize("way", CALIBRATED)
def test_an_unknown_calibration(caller: Caller, way: str) -> None:
    answer = caller.at_header(way, Request("cal-none"))
    assert answer == Answer(NOT_FOUND, "there is no calibration cal-none")


def test_an_open_calibration(caller: Caller, calibrations: Calibrations) -> None:
    answer = check_same(
        {way: caller.at_header(way, Request(calibrations.open)) for way in CALIBRATED}
    )
    assert (answer.code, answer.fields) == (PRECONDITION, [])
    assert answer.subjects == [("NOT_FINALIZED", calibrations.open)]


def test_a_calibration_of_other_features(caller: Caller, calibrations: Calibrations) -> None:
    answer = check_same(
        {way: caller.at_header(way, Request(calibrations.other_features)) for way in CALIBRATED}
    )
    assert (answer.code, answer.fields) == (INVALID, ["weight.shape"])
    assert calibrations.other_features in answer.message


def test_too_few_tokens(caller: Caller, calibrations: Calibrations) -> None:
    request = Request(calibrations.plain)
    request.spec.min_tokens = 129
    answer = check_same({way: caller.at_header(way, request) for way in CALIBRATED})
    assert (answer.code, answer.fields) == (PRECONDITION, [])
    assert answer.subjects == [("TOKENS", "spec.min_tokens")]
    request.spec.min_tokens = 128
    check_accepted({way: caller.whole(way, request) for way in CALIBRATED})


def test_held_out_tokens_do_not_count(caller: Caller, calibrations: Calibrations) -> None:
    about = caller.client.get_calibration(calibrations.held_out)
    assert about.held_out_tokens > 0
    request = Request(calibrations.held_out)
    request.spec.min_tokens = about.tokens + 1
    answer = check_same({way: caller.at_header(way, request) for way in CALIBRATED})
    assert answer.subjects == [("TOKENS", "spec.min_tokens")]
    request.spec.min_tokens = about.tokens
    check_accepted({way: caller.whole(way, request) for way in CALIBRATED})


def test_no_held_out_tokens(caller: Caller, calibrations: Calibrations) -> None:
    request = Request(calibrations.plain)
    ladder(0.1, 1)(request)
    answer = check_same({way: caller.at_header(way, request) for way in CALIBRATED})
    assert (answer.code, answer.fields) == (PRECONDITION, [])
    assert answer.subjects == [("HELD_OUT", "spec.damping.held_out")]
    request.calibration_id = calibrations.held_out
    check_accepted({way: caller.whole(way, request) for way in CALIBRATED})


def check_accepted(answers: dict[str, Answer]) -> None:
    answer = check_same(answers)
    assert answer.code == "OK", answer
    assert answer.result


# Activations that do not serve, of which the header says how many there will be.


@pytest.mark.parametrize("way", WITH_X)
def test_too_few_tokens_announced(caller: Caller, calibrations: Calibrations, way: str) -> None:
    request = Request(calibrations.plain)
    request.spec.min_tokens = TOKENS + 1
    answer = caller.at_header(way, request)
    assert (answer.code, answer.subjects) == (PRECONDITION, [("TOKENS", "spec.min_tokens")])
    request.spec.min_tokens = TOKENS
    assert caller.whole(way, request).code == "OK"


@pytest.mark.parametrize("way", WITH_X)
def test_tokens_that_will_be_held_out_do_not_count(
    caller: Caller, calibrations: Calibrations, way: str
) -> None:
    request = Request(calibrations.plain, held_out_fraction=0.25, sequence_rows=4)
    fit = TOKENS - int(held_out_rows("", TOKENS, 0.25, 4).sum())
    assert 0 < fit < TOKENS
    request.spec.min_tokens = fit + 1
    answer = caller.at_header(way, request)
    assert (answer.code, answer.subjects) == (PRECONDITION, [("TOKENS", "spec.min_tokens")])
    request.spec.min_tokens = fit
    assert caller.whole(way, request).code == "OK"


@pytest.mark.parametrize("way", WITH_X)
def test_damping_by_held_out_tokens_without_any(
    caller: Caller, calibrations: Calibrations, way: str
) -> None:
    request = Request(calibrations.plain, held_out_fraction=0.0)
    ladder(0.1, 1)(request)
    answer = caller.at_header(way, request)
    assert (answer.code, answer.subjects) == (
        PRECONDITION,
        [("HELD_OUT", "spec.damping.held_out")],
    )


# Plain rounding has no damping, whatever rule the spec names.


def test_nearest_needs_no_held_out_tokens(caller: Caller, calibrations: Calibrations) -> None:
    request = Request(calibrations.plain)
    NEAREST(request)
    check_accepted({way: caller.whole(way, request) for way in CALIBRATED})
    without = caller.whole(QUANTIZE, request)
    ladder(0.1, 1)(request)
    answers = {way: caller.whole(way, request) for way in CALIBRATED}
    check_accepted(answers)
    assert answers[QUANTIZE] == without


@pytest.mark.parametrize("way", WITH_X)
def test_nearest_holds_nothing_out(caller: Caller, calibrations: Calibrations, way: str) -> None:
    request = Request(calibrations.plain)
    both(NEAREST, ladder(0.1, 1))(request)
    # All of them are there to fit.
    request.spec.min_tokens = TOKENS
    assert caller.whole(way, request).code == "OK"


def test_nearest_certifies_that_nothing_was_held_out(
    caller: Caller, calibrations: Calibrations
) -> None:
    request = Request(calibrations.plain)
    both(NEAREST, ladder(0.1, 1))(request)
    pipe, call = caller.begin(
        QUANTIZE_X, [request.header(QUANTIZE_X), *request.tensors(QUANTIZE_X)]
    )
    pipe.close()
    certificate = collect(call).certificate
    assert (certificate.tokens, certificate.held_out_tokens) == (TOKENS, 0)
    assert certificate.held_out_fraction == 0


def test_nearest_keeps_what_it_was_told_to_hold_out(
    caller: Caller, calibrations: Calibrations
) -> None:
    request = Request(calibrations.plain, held_out_fraction=0.25, sequence_rows=4)
    both(NEAREST, ladder(0.1, 1))(request)
    pipe, call = caller.begin(
        QUANTIZE_X, [request.header(QUANTIZE_X), *request.tensors(QUANTIZE_X)]
    )
    pipe.close()
    certificate = collect(call).certificate
    assert certificate.held_out_tokens == int(held_out_rows("", TOKENS, 0.25, 4).sum())


# Good requests.

GOOD: dict[str, Change] = {
    "4 bits": spec_with(bits=4),
    "names of the largest size": both(
        set_field("layer_name", "n" * 256), set_weight(name="n" * 256)
    ),
    "3 bits, groups, zeros": spec_with(bits=3, symmetric=False, group_size=8),
    "grid": grid_with(),
    "grid with zeros": grid_with(symmetric=False, lowest_code=1, highest_code=14),
    "GPTQ": GPTQ,
    "GPTQ v2": spec_with(format=S.FORMAT_GPTQ_V2, symmetric=False),
    "compressed-tensors": both(PACKED, spec_with(group_size=16)),
    "compressed-tensors, 5 bits, zeros": both(PACKED, spec_with(bits=5, symmetric=False)),
    "stochastic": both(STOCHASTIC, spec_with(seed=3)),
    "nearest": NEAREST,
    "PiSO": PISO,
    "Qronos": spec_with(method=S.METHOD_QRONOS),
    "damping of the middle": damping_with(relative_sigma_max=1e-3),
    "held out": ladder(0.01, 0.1, 1),
    "quality": spec_with(quality=S.QUALITY_FAST),
}


@pytest.mark.parametrize("name", list(GOOD))
def test_a_good_request(caller: Caller, calibrations: Calibrations, name: str) -> None:
    answers = {}
    for way in EVERY:
        request = Request(calibrations.held_out)
        GOOD[name](request)
        answers[way] = caller.whole(way, request)
    # Sums of other tokens; the two ways with X agree with each other.
    check_accepted({way: answers.pop(way) for way in WITH_X})
    check_accepted(answers)


# Streams that break the contract.

Frames = Callable[[Request, str], list[object]]


def nothing(way: str) -> object:
    """A message without a payload."""
    return job_pb2.CreateJobRequest() if way == CREATE_JOB else service_pb2.QuantizeRequest()


def chunk(row: int, data: bytes) -> Frames:
    return lambda request, way: [request.header(way), request.weight_chunk(way, row, data)]


W = weights()
NOT_FINITE = W.copy()
NOT_FINITE[5, 9] = np.inf
ROW_BYTES = FEATURES * 4

STREAMS: dict[str, tuple[Frames, str]] = {
    "no message": (lambda request, way: [], "header"),
    "a message of nothing first": (lambda request, way: [nothing(way)], "header"),
    "weights first": (
        lambda request, way: [request.weight_chunk(way, 0, W.tobytes())],
        "header",
    ),
    "two headers": (
        lambda request, way: [request.header(way), request.header(way)],
        "header",
    ),
    "a message of nothing": (
        lambda request, way: [request.header(way), nothing(way)],
        "payload",
    ),
    "no weights": (lambda request, way: [request.header(way)], "weight"),
    "half the weights": (chunk(0, W[:4].tobytes()), "weight"),
    "a gap": (chunk(1, W[1:].tobytes()), "weight.row_offset"),
    "a row below 0": (chunk(-1, W.tobytes()), "weight.row_offset"),
    "rows twice": (
        lambda request, way: [
            *chunk(0, W[:4].tobytes())(request, way),
            request.weight_chunk(way, 0, W[:4].tobytes()),
        ],
        "weight.row_offset",
    ),
    "no row": (chunk(0, b""), "weight.data"),
    "half a row": (chunk(0, W.tobytes()[: ROW_BYTES // 2]), "weight.data"),
    "too many rows": (chunk(0, W.tobytes() + W[:1].tobytes()), "weight.data"),
    "a row after the last": (
        lambda request, way: [
            *chunk(0, W.tobytes())(request, way),
            request.weight_chunk(way, ROWS, W[:1].tobytes()),
        ],
        "weight.data",
    ),
    "a value that is not finite": (chunk(0, NOT_FINITE.tobytes()), "weight.data"),
}


@pytest.mark.parametrize("name", list(STREAMS))
def test_a_broken_stream(caller: Caller, calibrations: Calibrations, name: str) -> None:
    frames, field = STREAMS[name]
    request = Request(calibrations.plain)
    answer = check_same({way: caller.messages(way, frames(request, way)) for way in ON_THE_WIRE})
    assert (answer.code, answer.fields) == (INVALID, [field])


def test_a_value_that_is_not_finite(caller: Caller, calibrations: Calibrations) -> None:
    request = Request(calibrations.plain, W=NOT_FINITE)
    answer = check_same({way: caller.whole(way, request) for way in EVERY})
    assert (answer.code, answer.fields) == (INVALID, ["weight.data"])
    assert "row 5, column 9" in answer.message


@pytest.mark.parametrize("name", ["a message of nothing first", "weights first"])
@pytest.mark.parametrize("way", ON_THE_WIRE)
def test_a_wrong_first_message_is_refused_as_it_comes(
    caller: Caller, calibrations: Calibrations, way: str, name: str
) -> None:
    frames, field = STREAMS[name]
    pipe, call = caller.begin(way, frames(Request(calibrations.plain), way), HEADER_SECONDS)
    answer = caller.finish(way, call)
    pipe.close()
    assert (answer.code, answer.fields) == (INVALID, [field])


# A calibration stays from the header on.


def of_128_tokens(caller: Caller) -> certiq.Calibration:
    """Of a test's own."""
    return calibrated(caller.client, made_up(np.random.default_rng(3), "rank-0", 128, FEATURES))


@pytest.mark.parametrize("way", ON_THE_WIRE)
def test_a_calibration_in_use_is_not_deleted(caller: Caller, way: str) -> None:
    calibration = of_128_tokens(caller)
    request = Request(calibration.id)
    expected = (PRECONDITION, [("IN_USE", calibration.id)])
    pipe, call = begun(caller, way, request)
    answer = answered(calibration.delete)
    assert (answer.code, answer.subjects) == expected
    pipe.send(request.weight_chunk(way, 0, request.W[:4].tobytes()))
    answer = answered(calibration.delete)
    assert (answer.code, answer.subjects) == expected
    pipe.send(request.weight_chunk(way, 4, request.W[4:].tobytes()))
    pipe.close()
    assert caller.finish(way, call).code == "OK"
    assert calibration.refresh().info.jobs == 0
    assert answered(calibration.delete) == Answer("OK")


@pytest.mark.parametrize("way", ON_THE_WIRE)
@pytest.mark.parametrize("how", ["cancelled", "refused"])
def test_a_call_that_fails_lets_its_calibration_go(caller: Caller, way: str, how: str) -> None:
    calibration = of_128_tokens(caller)
    pipe, call = begun(caller, way, Request(calibration.id))
    if how == "cancelled":
        call.cancel()
    else:
        pipe.send(nothing(way))
        assert caller.finish(way, call).code == INVALID
    pipe.close()
    wait_until(lambda: calibration.refresh().info.jobs == 0, "its calibration is free")
    assert answered(calibration.delete) == Answer("OK")


# Room.


@pytest.mark.parametrize("way", EVERY)
def test_a_layer_that_never_fits(start_server: StartServer, way: str) -> None:
    caller = Caller(start_server("--memory_budget_bytes", str(16 << 20)))
    request = Request(of_128_tokens(caller).id)
    shape = (1 << 17, FEATURES)
    request.weight.shape[:] = shape
    request.W = np.zeros(shape, "<f4")
    answer = caller.at_header(way, request)
    assert (answer.code, answer.fields, answer.preconditions) == (EXHAUSTED, [], ())
    assert not answer.retry
    assert "cannot fit, however long you wait" in answer.message


@dataclass(frozen=True)
class Full:
    """A server without a place for another layer."""

    caller: Caller
    calibration_id: str


def taken(caller: Caller) -> tuple[Full, Callable[[], None]]:
    """Takes the only place by a call that uploads; the second value gives it back."""
    request = Request(of_128_tokens(caller).id)
    pipe, call = begun(caller, QUANTIZE, request)

    def give_back() -> None:
        call.cancel()
        pipe.close()

    return Full(caller, request.calibration_id), give_back


def check_full(full: Full) -> None:
    request = Request(full.calibration_id)
    answer = check_same({way: full.caller.at_header(way, request) for way in EVERY})
    assert (answer.code, answer.fields, answer.preconditions) == (EXHAUSTED, [], ())
    assert answer.retry


def test_a_full_queue(start_server: StartServer) -> None:
    server = start_server("--workers", "1", "--queue_limit", "1")
    full, give_back = taken(Caller(server))
    check_full(full)
    give_back()


WRITER, READER = "writer-token-0123456789", "reader-token-0123456789"


@pytest.fixture
def guarded(start_server: StartServer, tmp_path: Path) -> Server:
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text(f"{WRITER} one read,write jobs=1\n{READER} one read jobs=1\n")
    return start_server("--token_file", str(tokens))


def test_a_quota_of_jobs(guarded: Server) -> None:
    full, give_back = taken(Caller(guarded, WRITER))
    check_full(full)
    give_back()


@pytest.mark.parametrize(
    ("token", "code"),
    [
        ("", "UNAUTHENTICATED"),
        ("nobody-token-0123456789", "UNAUTHENTICATED"),
        (READER, "PERMISSION_DENIED"),
    ],
)
def test_who_may_not(guarded: Server, token: str, code: str) -> None:
    caller = Caller(guarded, token)
    answer = check_same({way: caller.at_header(way, Request("cal-none")) for way in EVERY})
    assert answer.code == code
    assert (answer.fields, answer.preconditions, answer.retry) == ([], (), False)
