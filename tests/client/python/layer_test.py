"""One layer in one call: what comes back is what the certificate says."""

import hashlib
from pathlib import Path
from typing import Any

import certiq
import ml_dtypes
import numpy as np
import pytest
from certiq.layer import unpack_bits
from certiq.progress import Event, Stage, Upload
from certiq.spec import FormatName, MethodName, QualityName
from programs import Server
from verification import check_everything, store, verify

Array = np.ndarray[Any, np.dtype[Any]]
FORMATS: tuple[FormatName, ...] = (
    "dense_f32",
    "dense_f16",
    "dense_bf16",
    "gptq",
    "gptq_v2",
    "compressed_tensors",
)


def made_up(
    random: np.random.Generator, rows: int = 24, features: int = 64, tokens: int = 700
) -> tuple[Array, Array]:
    mixing = random.standard_normal((features, features)) / np.sqrt(features)
    X = random.standard_normal((tokens, features)) @ (np.eye(features) + mixing)
    return random.standard_normal((rows, features)).astype("<f4"), X.astype("<f4")


def relative_error(W: Array, Q: Array, X: Array, X_quantized: Array | None = None) -> float:
    W, Q, X = (np.asarray(a, np.float64) for a in (W, Q, X))
    seen = X if X_quantized is None else np.asarray(X_quantized, np.float64)
    reference = X @ W.T
    return float(np.linalg.norm(reference - seen @ Q.T) / np.linalg.norm(reference))


def assert_true(layer: certiq.Layer, W: Array, X: Array, X_quantized: Array | None = None) -> None:
    """Its error, recomputed in float64, is that of the certificate."""
    found = relative_error(W, layer.dequantized(), X, X_quantized)
    assert layer.relative_error == pytest.approx(found, rel=1e-4, abs=1e-6)
    assert np.sqrt(layer.certificate.squared_error) <= layer.certificate.l2_bound


@pytest.mark.parametrize(("symmetric", "group_size"), [(True, 0), (False, 96)])
def test_the_certificate_holds(
    client: certiq.Client,
    carried_weight: Array,
    carried_x: Array,
    tmp_path: Path,
    symmetric: bool,
    group_size: int,
) -> None:
    spec = certiq.Spec(
        method="optq", bits=4, symmetric=symmetric, group_size=group_size, compare_nearest=True
    )
    layer = client.quantize(carried_weight, carried_x, spec, name="carried")
    check_everything(store(tmp_path, carried_weight, carried_x, layer))
    assert layer.name == "carried"
    assert layer.shape == carried_weight.shape
    assert layer.relative_error < layer.certificate.nearest_relative_error


@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize(
    ("format_name", "symmetric"),
    # Version 1 has no zero point of 0: the server refuses asymmetric grids.
    [
        (name, symmetric)
        for name in FORMATS
        for symmetric in (True, False)
        if symmetric or name != "gptq"
    ],
)
def test_every_format_is_dequantized(
    client: certiq.Client,
    random: np.random.Generator,
    format_name: FormatName,
    symmetric: bool,
    group_size: int,
) -> None:
    W, X = made_up(random, rows=32, features=96)
    spec = certiq.Spec(
        bits=3,
        symmetric=symmetric,
        group_size=group_size,
        order="decreasing_norm",
        format=format_name,
    )
    layer = client.quantize(W, X, spec)
    assert layer.dequantized().dtype == np.float32
    assert_true(layer, W, X)
    if "weight" not in layer.tensors:
        codes = layer.codes()
        assert codes.shape == W.shape
        assert codes.max() < 2**layer.certificate.bits


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_number_of_bits_is_unpacked(random: np.random.Generator, bits: int) -> None:
    codes = random.integers(0, 2**bits, (3, 67))
    streams = [sum(int(code) << (i * bits) for i, code in enumerate(row)) for row in codes]
    words = -(-67 * bits // 32)
    packed = [[stream >> (32 * word) & 0xFFFFFFFF for word in range(words)] for stream in streams]
    array = np.array(packed, "<u4").view("<i4")
    np.testing.assert_array_equal(unpack_bits(array, bits, 67), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_features_that_end_within_a_word(
    client: certiq.Client, random: np.random.Generator, bits: int
) -> None:
    W, X = made_up(random, rows=33, features=75)
    spec = certiq.Spec(bits=bits, symmetric=False, format="compressed_tensors", group_size=25)
    assert_true(client.quantize(W, X, spec), W, X)


def test_groups_in_the_order_of_work(client: certiq.Client, random: np.random.Generator) -> None:
    W, X = made_up(random, rows=32, features=96)
    formats: list[FormatName] = ["gptq_v2", "dense_f32"]
    for format_name in formats:
        spec = certiq.Spec(
            bits=4,
            group_size=32,
            group_scales="dynamic",
            order="decreasing_norm",
            format=format_name,
        )
        assert_true(client.quantize(W, X, spec), W, X)


def test_compressed_tensors_has_no_groups_in_another_order(
    client: certiq.Client, random: np.random.Generator
) -> None:
    W, X = made_up(random, rows=32, features=96)
    for given in ({"order": "decreasing_norm"}, {"quality": "fast"}):
        spec = certiq.Spec(
            format="compressed_tensors", group_size=32, group_scales="dynamic", **given
        )
        with pytest.raises(certiq.InvalidArgument, match=r"GROUP_SCALES_STATIC.*got.*DYNAMIC") as e:
            client.quantize(W, X, spec)
        assert e.value.field == "spec.group_scales"
        assert "FORMAT_GPTQ_V2" in e.value.reason


@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize(
    ("format_name", "size"),
    [
        *(("gptq", 1e-9), ("gptq_v2", 1e-9), ("compressed_tensors", 1e-9)),
        *(("dense_f16", 1e-9), ("dense_bf16", 1e-42), ("dense_f32", 2.0**-149)),
    ],
)
def test_weights_too_small_become_zeros_and_are_named(
    client: certiq.Client,
    random: np.random.Generator,
    tmp_path: Path,
    format_name: FormatName,
    size: float,
    group_size: int,
) -> None:
    W, X = made_up(random, rows=32, features=96)
    # A row that training forgot.
    W[7] = size * np.sign(W[7])
    spec = certiq.Spec(format=format_name, group_size=group_size, order="decreasing_norm")
    layer = client.quantize(W, X, spec)
    underflow = layer.certificate.underflow
    assert (underflow.rows, list(underflow.first_rows)) == (1, [7])
    assert underflow.groups == (3 if group_size else 1)
    assert any("became zeros" in text and "7" in text for text in layer.certificate.warnings)
    assert not layer.dequantized()[7].any()
    for name in ("scales", "weight_scale"):
        if name in layer.tensors:
            scales = layer.tensors[name].astype(np.float64)
            assert np.isfinite(scales).all()
            assert (scales > 0).all()
    verify(store(tmp_path, W, X, layer))


def test_weights_too_large_for_their_scales_are_refused_by_name(
    client: certiq.Client, random: np.random.Generator
) -> None:
    W, X = made_up(random, rows=32, features=96)
    W[7, 11] = 1e6
    with pytest.raises(certiq.InvalidArgument, match=r"row 7 .*1e\+06.*column 11") as caught:
        client.quantize(W, X, certiq.Spec(format="gptq"))
    assert caught.value.field == "spec.scale_dtype"


def test_mismatched_inputs(client: certiq.Client, random: np.random.Generator) -> None:
    W, X = made_up(random)
    seen = X + 0.05 * random.standard_normal(X.shape).astype("<f4")
    layer = client.quantize(
        W,
        X,
        certiq.Spec(method="qronos", bits=4),
        activations_quantized=seen,
        held_out_fraction=0.25,
    )
    assert layer.certificate.HasField("qronos_initial")
    assert layer.certificate.held_out_tokens > 0
    found = relative_error(W, layer.dequantized(), X, seen)
    # On the tokens of both portions together.
    assert layer.relative_error == pytest.approx(found, rel=0.3)


TYPES = ("<f8", ">f4", "<f4", "<f2", "bfloat16")


@pytest.mark.parametrize("x_type", [*TYPES, "<i8", "<i4", "u1"])
@pytest.mark.parametrize("w_type", TYPES)
def test_types_of_elements(
    client: certiq.Client, random: np.random.Generator, w_type: str, x_type: str
) -> None:
    def cast(values: Array, kind: str) -> Array:
        dtype = np.dtype(ml_dtypes.bfloat16) if kind == "bfloat16" else np.dtype(kind)
        return (values if dtype.kind not in "iu" else np.abs(10 * values)).astype(dtype)

    W, X = made_up(random, rows=8, features=32, tokens=100)
    W, X = cast(W, w_type), cast(X, x_type)
    layer = client.quantize(W, X, certiq.Spec(bits=4))
    assert_true(layer, W.astype("<f8"), X.astype("<f8"))
    little = X.astype(X.dtype.newbyteorder("<")).tobytes()
    assert layer.certificate.x_sha256 == hashlib.sha256(little).hexdigest()


def test_memory_of_any_shape(client: certiq.Client, random: np.random.Generator) -> None:
    """Transposed, cut out, read-only, batches: the same bytes arrive, so the same come back."""
    W, X = made_up(random, tokens=640)
    expected = client.quantize(W, X).certificate
    wide = np.zeros((640, 200), "<f4")
    wide[:, 3:195:3] = X
    frozen = X.copy()
    frozen.flags.writeable = False
    shapes = [
        (np.asfortranarray(W), X),
        (np.ascontiguousarray(W.T).T, np.ascontiguousarray(X.T).T),
        (W[::-1][::-1], wide[:, 3:195:3]),
        (W, frozen.reshape(4, 160, 64)),
        (W, X.reshape(2, 2, 160, 64)),
    ]
    for weight, activations in shapes:
        found = client.quantize(weight, activations).certificate
        assert found.weights_sha256 == expected.weights_sha256
        assert found.x_sha256 == expected.x_sha256
        assert found.squared_error == expected.squared_error


def test_many_messages(server: Server, random: np.random.Generator) -> None:
    """Rows that fill messages, and rows that are larger than one."""
    W, X = made_up(random, tokens=300)
    expected: bytes | None = None
    for chunk_bytes in (1, 256, 1000, 1 << 20):
        with certiq.Client(server.address, chunk_bytes=chunk_bytes) as client:
            layer = client.quantize(W, X, certiq.Spec(bits=3))
        if expected is None:
            expected = layer.tensors["weight"].tobytes()
        assert layer.tensors["weight"].tobytes() == expected


def test_what_is_reported(client: certiq.Client, random: np.random.Generator) -> None:
    W, X = made_up(random)
    events: list[Event] = []
    client.quantize(W, X, progress=events.append)
    uploads = [event for event in events if isinstance(event, Upload)]
    assert uploads[-1] == Upload(W.nbytes + X.nbytes, W.nbytes + X.nbytes)
    assert [u.bytes for u in uploads] == sorted(u.bytes for u in uploads)
    phases = {event.phase for event in events if isinstance(event, Stage)}
    assert {"receive", "factor", "round", "certify"} <= phases


def test_a_bar(
    client: certiq.Client, random: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    W, X = made_up(random)
    client.quantize(W, X, name="q_proj", progress=True)
    assert "q_proj: 100%" in capsys.readouterr().err


def test_an_explicit_grid(client: certiq.Client, random: np.random.Generator) -> None:
    W, X = made_up(random, rows=8)
    scales = np.full((8, 1), 0.25)
    layer = client.quantize(W, X, certiq.Spec(bits=4, grid=certiq.Grid(scales)))
    np.testing.assert_array_equal(layer.tensors["scales"], scales.astype("<f4"))
    assert_true(layer, W, X)


def test_the_same_spec_again(client: certiq.Client, random: np.random.Generator) -> None:
    """A certificate's spec, with every setting decided, is a spec."""
    W, X = made_up(random)
    spec = certiq.Spec(bits=3, rounding="stochastic", seed=7, order="decreasing_norm")
    first = client.quantize(W, X, spec)
    again = client.quantize(W, X, first.certificate.spec)
    np.testing.assert_array_equal(first.tensors["weight"], again.tensors["weight"])


@pytest.mark.parametrize("damping", ["relative_trace:0.01", "relative_trace:1e-9"])
@pytest.mark.parametrize("method", ["optq", "nearest"])
def test_massive_tokens_are_certified_as_they_are(
    client: certiq.Client,
    random: np.random.Generator,
    tmp_path: Path,
    method: MethodName,
    damping: str,
) -> None:
    """A few tokens ten thousand times the others, as transformers have them: the error is not what
    rounding in their sums leaves of it."""
    W, X = made_up(random)
    X[[0, 350]] *= np.float32(3e4)
    layer = client.quantize(
        W, X, certiq.Spec(bits=8, method=method, damping=None if method == "nearest" else damping)
    )
    found = relative_error(W, layer.dequantized(), X)
    assert layer.relative_error == pytest.approx(found, rel=1e-3)
    low, high = layer.relative_error_range
    assert low <= found * (1 + 1e-3)
    assert found <= high * (1 + 1e-3)
    assert high - low < 0.05 * found
    verify(store(tmp_path, W, X, layer))


def test_what_rounding_may_account_for(client: certiq.Client, random: np.random.Generator) -> None:
    """Features that are copies of one another but for a millionth: what the sums have of an error
    that is smaller than that is rounding, and the certificate says so."""
    W, X = made_up(random)
    X = (X[:, :1] + 1e-6 * X).astype("<f4")
    layer = client.quantize(W, X, certiq.Spec(damping="relative_trace:1e-8"))
    found = relative_error(W, layer.dequantized(), X)
    low, high = layer.relative_error_range
    assert low * (1 - 1e-4) <= found <= high * (1 + 1e-4)
    c = layer.certificate
    assert len(c.row_rounding) == len(c.row_error) == len(W)
    assert sum(c.row_rounding) == pytest.approx(c.squared_error_rounding)
    assert c.l2_bound >= found * np.sqrt(c.reference_energy) * (1 - 1e-4)


def test_few_tokens_are_said(client: certiq.Client, random: np.random.Generator) -> None:
    W, X = made_up(random)
    for tokens, method, said in (
        (60, "optq", True),
        (60, "qronos", True),
        (60, "nearest", False),
        (256, "optq", False),
    ):
        layer = client.quantize(W, X[:tokens], certiq.Spec(method=method))
        few = [w for w in layer.certificate.warnings if w.startswith("few tokens")]
        assert bool(few) is said, (tokens, method)
        assert all("METHOD_NEAREST" in w and "held_out" in w for w in few)


@pytest.mark.parametrize("quality", ["balanced", "best"])
def test_presets_say_where_plain_rounding_is_better(
    client: certiq.Client, random: np.random.Generator, quality: QualityName
) -> None:
    """Uncorrelated inputs, on which feedback has nothing to gain."""
    W = random.standard_normal((80, 64)).astype("<f4")
    X = random.standard_normal((96, 64)).astype("<f4")
    layer = client.quantize(W, X, certiq.Spec(quality=quality), sequence_rows=1)
    c = layer.certificate
    assert c.HasField("held_out_nearest_relative_error")
    worse = c.held_out_relative_error > c.held_out_nearest_relative_error
    said = any(w.startswith("worse than plain rounding") for w in c.warnings)
    assert said is worse


@pytest.mark.parametrize("value", ["absolute:1.7e308", "relative_trace:1e308"])
def test_a_lambda_beyond_float64_is_named(
    client: certiq.Client, random: np.random.Generator, value: str
) -> None:
    W, X = made_up(random)
    with pytest.raises(certiq.InvalidArgument) as caught:
        client.quantize(W, X, certiq.Spec(damping=value))
    assert caught.value.field == f"spec.damping.{value.split(':')[0]}"
    assert "lambda" in str(caught.value)
