"""Ready-made sums: in once, out as they are."""

from collections.abc import Callable, Iterator
from pathlib import Path

import certiq
import grpc
import numpy as np
import pytest
from conftest import StartServer
from programs import Server
from raw import Calls, fields, refusal
from stubs import calibration_pb2
from sums import F32, F64, FULL, MISMATCHED, UPPER, Sums, made_up
from work import client_of, create, fill

N = 20
INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture(scope="module")
def durable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("statistics")
    server = Server(folder, ["--data_dir", str(folder / "data"), "--workers", "2"])
    yield server
    assert server.stop() == 0, server.log()


@pytest.fixture
def client(durable: Server) -> certiq.Client:
    return client_of(durable)


@pytest.fixture
def calls(durable: Server) -> Calls:
    return Calls(durable)


def some(random: np.random.Generator, mismatched: bool = False, tokens: int = 50) -> Sums:
    source = made_up(random, "", tokens, N, mismatched=mismatched)
    return Sums.of(source.x, source.x_quantized)


def import_message(calls: Calls, header: dict[str, object], data: bytes) -> object:
    """An import in one piece, whatever it holds."""
    frames = [calibration_pb2.ImportStatisticsRequest(header=header)]
    frames += [calibration_pb2.ImportStatisticsRequest(data=data)] if data else []
    return calls.calibrations.ImportStatistics(iter(frames), timeout=60)


def export_message(calls: Calls, calibration: certiq.Calibration, layout: int) -> bytes:
    """The bytes of an export; the package asks for triangles alone."""
    request = calibration_pb2.ExportStatisticsRequest(
        calibration_id=calibration.id, portion=calibration_pb2.PORTION_FIT, layout=layout
    )
    answer = calls.calibrations.ExportStatistics(request, timeout=60)
    assert next(answer).header.layout == layout
    return b"".join(frame.data for frame in answer)


KINDS = pytest.mark.parametrize("mismatched", [False, True], ids=["matched", "mismatched"])


@KINDS
@pytest.mark.parametrize("layout", [FULL, UPPER], ids=["full", "upper"])
@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_imports_add_up(
    durable: Server, random: np.random.Generator, mismatched: bool, layout: int, dtype: str
) -> None:
    source = made_up(random, "rank-0", 70, N, mismatched=mismatched)
    first, second = some(random, mismatched), some(random, mismatched, 9)
    # The second in pieces of one element.
    with client_of(durable) as client, client_of(durable, chunk_bytes=8) as small_pieces:
        calibration = create(client, N, mismatched=mismatched)
        fill(calibration, source)
        assert first.import_into(calibration, "i-1", layout=layout, dtype=dtype)
        assert calibration.tokens == 120
        again = small_pieces.get_calibration(calibration.id)
        assert second.import_into(again, "i-2", layout=layout, dtype=dtype)
        whole = Sums.of(source.x, source.x_quantized) + first + second
        Sums.exported(calibration).assert_equals(whole)
        streams = {s.stream_id: s for s in calibration.refresh().info.streams}
        assert {name for name, stream in streams.items() if stream.imported} == {"i-1", "i-2"}
        assert streams["i-2"].tokens == 9
        calibration.finalize(expected_tokens=129, expected_streams=["i-1", "i-2", "rank-0"])
        Sums.exported(calibration).assert_equals(whole)


def test_an_import_counts_once(client: certiq.Client, random: np.random.Generator) -> None:
    calibration = create(client, N)
    sums = some(random)
    assert sums.import_into(calibration, "i")
    for again in (sums, some(random)):
        assert not again.import_into(calibration, "i")
        assert calibration.tokens == sums.tokens
    Sums.exported(calibration).assert_equals(sums)
    calibration.finalize()
    assert not sums.import_into(calibration, "i")
    assert refusal(lambda: sums.import_into(calibration, "j")).code == PRECONDITION


def test_an_import_is_durable(
    start_server: StartServer, tmp_path: Path, random: np.random.Generator
) -> None:
    flags = ["--data_dir", str(tmp_path / "data"), "--commit_seconds", "3600"]
    server = start_server(*flags)
    calibration = create(client_of(server), N)
    sums = some(random)
    assert sums.import_into(calibration, "i")
    server.process.kill()
    server.wait()
    calibration = client_of(start_server(*flags)).get_calibration(calibration.id)
    Sums.exported(calibration).assert_equals(sums)
    assert not sums.import_into(calibration, "i")


def test_streams_and_imports_share_names(
    client: certiq.Client, random: np.random.Generator
) -> None:
    calibration = create(client, N)
    fill(calibration, made_up(random, "taken", 10, N))
    failed = refusal(lambda: some(random).import_into(calibration, "taken"))
    assert failed.code == PRECONDITION
    some(random).import_into(calibration, "other")
    other = made_up(random, "other", 10, N)
    assert refusal(lambda: fill(calibration, other)).code == PRECONDITION
    assert calibration.refresh().tokens == 60


def test_held_out_sums(client: certiq.Client, random: np.random.Generator) -> None:
    calibration = create(client, N, held_out_fraction=0.25)
    fit, held_out = some(random), some(random, tokens=8)
    fit.import_into(calibration, "fit")
    held_out.import_into(calibration, "held-out", held_out=True)
    now = calibration.refresh()
    assert (now.tokens, now.held_out_tokens) == (50, 8)
    Sums.exported(calibration).assert_equals(fit)
    Sums.exported(calibration, held_out=True).assert_equals(held_out)
    # One that holds nothing out has no place for them.
    without = create(client, N)
    failed = refusal(lambda: held_out.import_into(without, "s", held_out=True))
    assert failed.code == PRECONDITION
    Sums.exported(without, held_out=True).assert_equals(Sums.nothing(N, False))


@KINDS
@pytest.mark.parametrize("layout", [FULL, UPPER], ids=["full", "upper"])
def test_an_export_imports_again(
    client: certiq.Client, calls: Calls, random: np.random.Generator, mismatched: bool, layout: int
) -> None:
    """Rows that are no integers: what comes out is what goes in."""
    source = made_up(random, "rank-0", 333, N, mismatched=mismatched)
    noise = random.standard_normal(source.x.shape).astype(np.float32)
    source.x[:] += noise
    first, second = (create(client, N, mismatched=mismatched) for _ in range(2))
    fill(first, source)
    exported = Sums.exported(first)
    exported.assert_equals(Sums.of(source.x, source.x_quantized))
    data = export_message(calls, first, layout)
    assert data == exported.bytes(layout)
    known = {"calibration_id": second.id, "stream_id": "from-first", "tokens": exported.tokens}
    import_message(calls, known | {"dtype": F64, "layout": layout}, data)
    again = Sums.exported(second)
    again.assert_equals(exported)
    # Without X~ nothing is recombined on the way, and nothing may be lost.
    if not mismatched:
        assert again.bytes() == exported.bytes()
        digests = {calibration.finalize().info.sums_sha256 for calibration in (first, second)}
        assert len(digests) == 1


def test_an_empty_calibration_exports_zeros(client: certiq.Client) -> None:
    for mismatched in (False, True):
        calibration = create(client, N, mismatched=mismatched)
        Sums.exported(calibration).assert_equals(Sums.nothing(N, mismatched))


def spoil(change: Callable[[np.ndarray], object]) -> Callable[[Sums], bytes]:
    def spoiled(sums: Sums) -> bytes:
        H = sums.parts[0].copy()
        change(H)
        return Sums(sums.tokens, (H, *sums.parts[1:])).bytes(FULL)

    return spoiled


def put(row: int, column: int, value: float) -> Callable[[Sums], bytes]:
    return spoil(lambda H: H.__setitem__((row, column), value))


def both(value: float) -> Callable[[Sums], bytes]:
    def change(H: np.ndarray) -> None:
        H[2, 7] = H[7, 2] = value

    return spoil(change)


BAD = {
    "not symmetric": (put(9, 3, 1e4), "row 9, column 3"),
    "negative diagonal": (put(4, 4, -1.0), "row 4, column 4"),
    "beyond Cauchy-Schwarz": (both(1e6), "row 2, column 7"),
    "NaN": (put(5, 6, np.nan), "row 5, column 6"),
    "infinite": (put(0, 0, np.inf), "row 0, column 0"),
    "too short": (lambda sums: sums.bytes(FULL)[:-8], f"row {N - 1}, column {N - 1}"),
    "nothing": (lambda _: b"", "row 0, column 0"),
    "too long": (lambda sums: sums.bytes(FULL) + bytes(8), "no more"),
    "part of an element": (lambda sums: sums.bytes(FULL)[:-3], "whole number"),
}


@pytest.mark.parametrize("name", BAD)
@KINDS
def test_sums_that_no_rows_have(
    client: certiq.Client, calls: Calls, random: np.random.Generator, name: str, mismatched: bool
) -> None:
    make, words = BAD[name]
    if mismatched and name == "too short":
        words = f"X~^T X, row {N - 1}"
    calibration = create(client, N, mismatched=mismatched)
    sums = some(random, mismatched)
    header = {"calibration_id": calibration.id, "stream_id": "i", "tokens": sums.tokens}
    header |= {"dtype": F64, "layout": FULL}
    failed = refusal(lambda: import_message(calls, header, make(sums)))
    assert (failed.code, list(fields(failed))) == (INVALID, ["data"])
    assert words in failed.reason
    assert calibration.refresh().tokens == 0
    # The name is not used up.
    assert sums.import_into(calibration, "i")
    Sums.exported(calibration).assert_equals(sums)


@pytest.mark.parametrize("held_out", [False, True])
def test_sums_that_contradict_each_other_certify_nothing(
    client: certiq.Client, random: np.random.Generator, held_out: bool
) -> None:
    """Each entry is one that activations may have, all together are not: there is a direction of
    negative energy. A layer that meets it gets no certificate that says its error is 0."""
    contradictory = np.full((3, 3), 0.8)
    contradictory[0, 2] = contradictory[2, 0] = -0.8
    np.fill_diagonal(contradictory, 1)
    calibration = client.calibration(3, held_out_fraction=0.25, keep=True)
    for name, kept in (("fit", False), ("kept", True)):
        gram = contradictory if kept is held_out else np.eye(3)
        calibration.import_statistics(stream_id=name, gram=gram, tokens=100, held_out=kept)
    calibration.finalize()
    W = np.array([[1, -1, 1], [0.4, 0.2, -0.1]], dtype="<f4")
    for method in ("nearest", "optq", "qronos"):
        spec = certiq.Spec(method=method, damping=None if method == "nearest" else "absolute:9")
        with pytest.raises(certiq.FailedPrecondition) as caught:
            client.quantize(W, calibration=calibration.id, spec=spec)
        assert calibration.id in str(caught.value)
    calibration.delete()


@pytest.mark.parametrize("part", [1, 2])
def test_mismatched_sums_are_checked_too(
    client: certiq.Client, random: np.random.Generator, part: int
) -> None:
    """X~^T X as well: |G_ij|^2 is at most the product of both diagonals."""
    calibration = create(client, N, mismatched=True)
    sums = some(random, mismatched=True)
    sums.parts[part][1, 2] = sums.parts[part][2, 1] = 1e7
    failed = refusal(lambda: sums.import_into(calibration, "i"))
    assert (failed.code, list(fields(failed))) == (INVALID, ["data"])
    assert calibration.refresh().tokens == 0


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("stream_id", {"stream_id": ""}),
        ("stream_id", {"stream_id": "s" * 129}),
        ("tokens", {"tokens": 0}),
        ("tokens", {"tokens": -1}),
        ("tokens", {"tokens": 1 << 62}),
        ("portion", {"portion": 9}),
        ("dtype", {"dtype": 0}),
        ("dtype", {"dtype": 3}),
        ("layout", {"layout": 9}),
        ("features", {"features": N + 1}),
        ("kind", {"kind": MISMATCHED}),
    ],
)
def test_headers_that_make_no_sense(
    client: certiq.Client, calls: Calls, field: str, changed: dict[str, object]
) -> None:
    known = {"calibration_id": create(client, N).id, "stream_id": "s", "tokens": 1, "dtype": F64}
    failed = refusal(lambda: import_message(calls, known | changed, b""))
    assert (failed.code, list(fields(failed))) == (INVALID, [field])


def test_the_header_comes_first_and_once(client: certiq.Client, calls: Calls) -> None:
    header = calibration_pb2.ImportStatisticsRequest(
        header=calibration_pb2.StatisticsHeader(
            calibration_id=create(client, N).id, stream_id="s", tokens=1, dtype=F32
        )
    )
    data = calibration_pb2.ImportStatisticsRequest(data=bytes(4))
    empty = calibration_pb2.ImportStatisticsRequest()
    for frames in ([], [data], [empty], [header, header], [header, data, empty]):
        failed = refusal(lambda f=frames: calls.calibrations.ImportStatistics(iter(f), timeout=60))
        assert (failed.code, list(fields(failed))) == (INVALID, ["header"]), frames
