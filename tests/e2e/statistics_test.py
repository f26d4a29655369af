"""Ready-made sums: in once, out as they are."""

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from cluster import Client, refusal
from conftest import StartServer
from programs import Server
from stubs import calibration_pb2
from sums import F32, F64, FULL, HELD_OUT, MATCHED, MISMATCHED, UPPER, Sums, made_up

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
def client(durable: Server) -> Client:
    return Client.of(durable)


def some(random: np.random.Generator, mismatched: bool = False, tokens: int = 50) -> Sums:
    source = made_up(random, "", tokens, N, mismatched=mismatched)
    return Sums.of(source.x, source.x_quantized)


KINDS = pytest.mark.parametrize("mismatched", [False, True], ids=["matched", "mismatched"])


@KINDS
@pytest.mark.parametrize("layout", [FULL, UPPER], ids=["full", "upper"])
@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_imports_add_up(
    client: Client, random: np.random.Generator, mismatched: bool, layout: int, dtype: str
) -> None:
    calibration = client.create(N, kind=MISMATCHED if mismatched else MATCHED).id
    source = made_up(random, "rank-0", 70, N, mismatched=mismatched)
    client.accumulate(calibration, source)
    first, second = some(random, mismatched), some(random, mismatched, 9)
    answer = client.import_sums(calibration, "i-1", first, layout=layout, dtype=dtype)
    assert not answer.already_committed
    assert answer.calibration.tokens == 120
    # In pieces of one element.
    client.import_sums(calibration, "i-2", second, layout=layout, dtype=dtype, chunk_bytes=8)
    whole = Sums.of(source.x, source.x_quantized) + first + second
    client.export(calibration).assert_equals(whole)
    streams = {s.stream_id: s for s in client.get(calibration).streams}
    assert {name for name, stream in streams.items() if stream.imported} == {"i-1", "i-2"}
    assert streams["i-2"].tokens == 9
    client.finalize(calibration, 129, ["i-1", "i-2", "rank-0"])
    client.export(calibration).assert_equals(whole)


def test_an_import_counts_once(client: Client, random: np.random.Generator) -> None:
    calibration = client.create(N).id
    sums = some(random)
    assert not client.import_sums(calibration, "i", sums).already_committed
    for again in (sums, some(random)):
        answer = client.import_sums(calibration, "i", again)
        assert answer.already_committed
        assert answer.calibration.tokens == sums.tokens
    client.export(calibration).assert_equals(sums)
    client.finalize(calibration)
    assert client.import_sums(calibration, "i", sums).already_committed
    assert refusal(lambda: client.import_sums(calibration, "j", sums)).code == PRECONDITION


def test_an_import_is_durable(
    start_server: StartServer, tmp_path: Path, random: np.random.Generator
) -> None:
    flags = ["--data_dir", str(tmp_path / "data"), "--commit_seconds", "3600"]
    server = start_server(*flags)
    client = Client.of(server)
    calibration = client.create(N).id
    sums = some(random)
    client.import_sums(calibration, "i", sums)
    server.process.kill()
    server.wait()
    client = Client.of(start_server(*flags))
    client.export(calibration).assert_equals(sums)
    assert client.import_sums(calibration, "i", sums).already_committed


def test_streams_and_imports_share_names(client: Client, random: np.random.Generator) -> None:
    calibration = client.create(N).id
    source = made_up(random, "taken", 10, N)
    client.accumulate(calibration, source)
    failed = refusal(lambda: client.import_sums(calibration, "taken", some(random)))
    assert failed.code == PRECONDITION
    client.import_sums(calibration, "other", some(random))
    other = made_up(random, "other", 10, N)
    assert refusal(lambda: client.accumulate(calibration, other)).code == PRECONDITION
    assert client.get(calibration).tokens == 60


def test_held_out_sums(client: Client, random: np.random.Generator) -> None:
    calibration = client.create(N, fraction=0.25).id
    fit, held_out = some(random), some(random, tokens=8)
    client.import_sums(calibration, "fit", fit)
    client.import_sums(calibration, "held-out", held_out, portion=HELD_OUT)
    now = client.get(calibration)
    assert (now.tokens, now.held_out_tokens) == (50, 8)
    client.export(calibration).assert_equals(fit)
    client.export(calibration, HELD_OUT).assert_equals(held_out)
    # One that holds nothing out has no place for them.
    without = client.create(N).id
    failed = refusal(lambda: client.import_sums(without, "s", held_out, portion=HELD_OUT))
    assert failed.code == PRECONDITION
    nothing = client.export(without, HELD_OUT)
    nothing.assert_equals(Sums.nothing(N, False))


@KINDS
@pytest.mark.parametrize("layout", [FULL, UPPER], ids=["full", "upper"])
def test_an_export_imports_again(
    client: Client, random: np.random.Generator, mismatched: bool, layout: int
) -> None:
    """Rows that are no integers: what comes out is what goes in."""
    kind = MISMATCHED if mismatched else MATCHED
    source = made_up(random, "rank-0", 333, N, mismatched=mismatched)
    noise = random.standard_normal(source.x.shape).astype(np.float32)
    source.x[:] += noise
    first = client.create(N, kind=kind).id
    client.accumulate(first, source)
    exported = client.export(first, layout=layout)
    exported.assert_equals(Sums.of(source.x, source.x_quantized))
    second = client.create(N, kind=kind).id
    client.import_sums(second, "from-first", exported, layout=layout)
    again = client.export(second, layout=layout)
    again.assert_equals(exported)
    # Without X~ nothing is recombined on the way, and nothing may be lost.
    if not mismatched:
        assert again.bytes() == exported.bytes()
        assert client.finalize(first).sums_sha256 == client.finalize(second).sums_sha256


def test_an_empty_calibration_exports_zeros(client: Client) -> None:
    client.export(client.create(N).id).assert_equals(Sums.nothing(N, False))
    client.export(client.create(N, kind=MISMATCHED).id).assert_equals(Sums.nothing(N, True))


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
    client: Client, random: np.random.Generator, name: str, mismatched: bool
) -> None:
    make, words = BAD[name]
    if mismatched and name == "too short":
        words = f"X~^T X, row {N - 1}"
    calibration = client.create(N, kind=MISMATCHED if mismatched else MATCHED).id
    sums = some(random, mismatched)
    failed = refusal(
        lambda: client.import_sums(calibration, "i", sums, layout=FULL, data=make(sums))
    )
    assert (failed.code, list(failed.fields)) == (INVALID, ["data"])
    assert words in failed.fields["data"]
    assert client.get(calibration).tokens == 0
    # The name is not used up.
    assert not client.import_sums(calibration, "i", sums).already_committed
    client.export(calibration).assert_equals(sums)


@pytest.mark.parametrize("part", [1, 2])
def test_mismatched_sums_are_checked_too(
    client: Client, random: np.random.Generator, part: int
) -> None:
    """X~^T X as well: |G_ij|^2 is at most the product of both diagonals."""
    calibration = client.create(N, kind=MISMATCHED).id
    sums = some(random, mismatched=True)
    sums.parts[part][1, 2] = sums.parts[part][2, 1] = 1e7
    failed = refusal(lambda: client.import_sums(calibration, "i", sums))
    assert (failed.code, list(failed.fields)) == (INVALID, ["data"])
    assert client.get(calibration).tokens == 0


@pytest.mark.parametrize(
    ("field", "fields"),
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
def test_headers_that_make_no_sense(client: Client, field: str, fields: dict[str, object]) -> None:
    known = {"calibration_id": client.create(N).id, "stream_id": "s", "tokens": 1, "dtype": F64}
    header = calibration_pb2.StatisticsHeader(**known | fields)
    frames = [calibration_pb2.ImportStatisticsRequest(header=header)]
    failed = refusal(lambda: client.calibrations.ImportStatistics(iter(frames), timeout=60))
    assert (failed.code, list(failed.fields)) == (INVALID, [field])


def test_the_header_comes_first_and_once(client: Client) -> None:
    calibration = client.create(N).id
    header = calibration_pb2.ImportStatisticsRequest(
        header=calibration_pb2.StatisticsHeader(
            calibration_id=calibration, stream_id="s", tokens=1, dtype=F32
        )
    )
    data = calibration_pb2.ImportStatisticsRequest(data=bytes(4))
    empty = calibration_pb2.ImportStatisticsRequest()
    for frames in ([], [data], [empty], [header, header], [header, data, empty]):
        failed = refusal(lambda f=frames: client.calibrations.ImportStatistics(iter(f), timeout=60))
        assert (failed.code, list(failed.fields)) == (INVALID, ["header"]), frames
