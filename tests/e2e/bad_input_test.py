"""Mistakes on the command line: an exit code, and words that help."""

import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeLayer
from programs import Server, certiq
from safetensors.numpy import save
from verification import DTYPES, Layer

REFUSED = 1
USAGE = 2


@pytest.fixture
def layer(make_layer: MakeLayer, random: np.random.Generator) -> Layer:
    return make_layer(
        random.standard_normal((12, 24)).astype("<f4"),
        random.standard_normal((64, 24)).astype("<f4"),
    )


def quantize(server: Server, layer: Layer, tmp_path: Path, *flags: str) -> tuple[int, str]:
    """Exit status and what went to stderr; a refused layer leaves no file."""
    output = tmp_path / "refused.safetensors"
    report = tmp_path / "refused.json"
    done = certiq(
        *("quantize", "--server", server.address),
        *layer.flags(),
        *("--output", str(output), "--report", str(report)),
        *flags,
    )
    if done.returncode != 0:
        assert not output.exists()
        assert not report.exists()
    server.wait_idle()
    return done.returncode, done.stderr


def test_good_input_is_accepted(server: Server, layer: Layer, tmp_path: Path) -> None:
    status, errors = quantize(server, layer, tmp_path)
    assert status == 0, errors


@pytest.mark.parametrize(
    ("flags", "field", "expected"),
    [
        (["--scale_trials", "0"], "spec.scale_trials", "1 to 32"),
        (["--scale_trials", "3", "--method", "nearest"], "spec.scale_trials", "METHOD_NEAREST"),
        (["--polish", "-1"], "spec.polish", "0 to 64"),
        (["--polish", "2", "--rounding", "stochastic"], "spec.polish", "unbiased"),
    ],
    ids=lambda v: str(v).replace(" ", ""),
)
def test_searches_that_cannot_be(
    server: Server, layer: Layer, tmp_path: Path, flags: list[str], field: str, expected: str
) -> None:
    status, errors = quantize(server, layer, tmp_path, *flags)
    assert status == REFUSED
    assert "INVALID_ARGUMENT" in errors
    assert field in errors
    assert expected in errors


@pytest.mark.parametrize("bits", ["1", "9", "0", "-4"])
def test_bits_out_of_range(server: Server, layer: Layer, tmp_path: Path, bits: str) -> None:
    status, errors = quantize(server, layer, tmp_path, "--bits", bits)
    assert status == REFUSED
    assert "INVALID_ARGUMENT" in errors
    assert "spec.bits" in errors
    assert "2 to 8" in errors
    assert f"got {bits}" in errors


@pytest.mark.parametrize("group_size", ["-1", "1", "3", "7", "-128"])
def test_group_sizes_out_of_range(
    server: Server, layer: Layer, tmp_path: Path, group_size: str
) -> None:
    status, errors = quantize(server, layer, tmp_path, "--group_size", group_size)
    assert status == REFUSED
    assert "INVALID_ARGUMENT" in errors
    assert "spec.group_size" in errors
    assert "at least 8" in errors
    assert f"got {group_size}" in errors


@pytest.mark.parametrize("damping", ["absolute:-1", "relative_trace:-0.5", "absolute:1e400"])
def test_damping_out_of_range(server: Server, layer: Layer, tmp_path: Path, damping: str) -> None:
    status, errors = quantize(server, layer, tmp_path, "--damping", damping)
    assert status in (REFUSED, USAGE)
    assert "damping" in errors


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("which", ["weight", "x"])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_values_that_are_not_finite_are_refused_with_their_place(
    server: Server,
    make_layer: MakeLayer,
    random: np.random.Generator,
    tmp_path: Path,
    value: float,
    which: str,
    dtype: str,
) -> None:
    weight = random.standard_normal((12, 24))
    x = random.standard_normal((640, 24))
    row, column = (7, 19) if which == "weight" else (611, 5)
    (weight if which == "weight" else x)[row, column] = value
    layer = make_layer(
        weight.astype(DTYPES[dtype if which == "weight" else "F32"]),
        x.astype(DTYPES[dtype if which == "x" else "F32"]),
    )
    status, errors = quantize(server, layer, tmp_path)
    assert status == REFUSED
    assert "INVALID_ARGUMENT" in errors
    assert re.search(rf"\b{which}\b", errors)
    assert re.search(rf"row\D{{0,3}}{row}\b", errors)
    assert re.search(rf"(column|feature)\D{{0,3}}{column}\b", errors)


def test_activations_that_are_all_zero(
    server: Server, make_layer: MakeLayer, random: np.random.Generator, tmp_path: Path
) -> None:
    weight = random.standard_normal((12, 24)).astype("<f4")
    status, errors = quantize(server, make_layer(weight, np.zeros((64, 24), "<f4")), tmp_path)
    assert status == REFUSED
    assert "FAILED_PRECONDITION" in errors
    assert "zero" in errors


@pytest.mark.parametrize(
    ("weight_shape", "x_shape", "words"),
    [
        ((12, 24), (64, 23), ["x", "24", "23"]),
        ((12,), (64, 12), ["weight", "12"]),
        ((3, 4, 2), (64, 2), ["weight", "3"]),
        ((12, 24), (24,), ["x", "24"]),
        ((0, 24), (64, 24), ["weight", "0"]),
        ((12, 0), (64, 0), ["weight", "0"]),
        ((12, 24), (0, 24), ["x", "0"]),
    ],
)
def test_shapes_that_do_not_fit(
    server: Server,
    make_layer: MakeLayer,
    tmp_path: Path,
    weight_shape: tuple[int, ...],
    x_shape: tuple[int, ...],
    words: list[str],
) -> None:
    layer = make_layer(np.ones(weight_shape, "<f4"), np.ones(x_shape, "<f4"))
    status, errors = quantize(server, layer, tmp_path)
    assert status == REFUSED
    assert "INVALID_ARGUMENT" in errors
    assert all(word in errors for word in words)


def test_weights_of_integers(server: Server, make_layer: MakeLayer, tmp_path: Path) -> None:
    layer = make_layer(np.ones((12, 24), "<i4"), np.ones((64, 24), "<f4"))
    status, errors = quantize(server, layer, tmp_path)
    assert status == REFUSED
    assert "INVALID_ARGUMENT" in errors
    assert "weight" in errors
    assert "I32" in errors


# Files.


def test_a_file_that_is_not_there(server: Server, layer: Layer, tmp_path: Path) -> None:
    absent = Layer(tmp_path / "absent", layer.weight, layer.activations_file, layer.x)
    status, errors = quantize(server, absent, tmp_path)
    assert status == REFUSED
    assert str(tmp_path / "absent") in errors


def test_a_tensor_that_is_not_there(server: Server, layer: Layer, tmp_path: Path) -> None:
    absent = Layer(layer.weights_file, "w.wight", layer.activations_file, layer.x)
    status, errors = quantize(server, absent, tmp_path)
    assert status == REFUSED
    assert '"w.wight"' in errors
    # And the one that was meant.
    assert '"w.weight"' in errors


def test_an_output_that_cannot_be_written(server: Server, layer: Layer, tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such" / "folder" / "q.safetensors"
    done = certiq("quantize", "--server", server.address, *layer.flags(), "--output", str(missing))
    assert done.returncode == REFUSED
    assert str(missing) in done.stderr


def parts(file: bytes) -> tuple[dict, bytes]:
    """The header and the data of a safetensors file."""
    start = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:start]), file[start:]


def assemble(header: dict | str, data: bytes, header_bytes: int | None = None) -> bytes:
    """A file of these parts, however little they fit together."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    length = len(text) if header_bytes is None else header_bytes
    return length.to_bytes(8, "little") + text + data


WHOLE = save({"w.weight": np.ones((12, 24), "<f4"), "x": np.ones((64, 24), "<f4")})
HEADER, DATA = parts(WHOLE)
assert HEADER["w.weight"]["data_offsets"] == [0, 1152]


def changed(**entry: object) -> bytes:
    """The good file, with a lie about the weight."""
    return assemble(HEADER | {"w.weight": HEADER["w.weight"] | entry}, DATA)


MALFORMED = {
    "empty": b"",
    "seven_bytes": WHOLE[:7],
    "length_alone": WHOLE[:8],
    "header_cut": WHOLE[:40],
    "data_cut": WHOLE[:-1],
    "data_cut_in_half": WHOLE[: len(WHOLE) // 2],
    "bytes_left_over": WHOLE + b"\0",
    "header_longer_than_file": assemble(HEADER, DATA, header_bytes=1 << 20),
    "header_of_2_to_63_bytes": assemble(HEADER, DATA, header_bytes=1 << 63),
    "header_of_all_ones": assemble(HEADER, DATA, header_bytes=(1 << 64) - 1),
    "header_empty": assemble("", DATA),
    "not_json": assemble("{" * 40, DATA),
    "not_an_object": assemble("[1, 2]", DATA),
    "deep_nesting": assemble("[" * 100_000, DATA),
    "not_utf8": b"\x04" + bytes(7) + b'{"\xff\xfe',
    "no_dtype": assemble({"w.weight": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "unknown_dtype": changed(dtype="F31"),
    "dtype_of_another_size": changed(dtype="F64"),
    "dtype_no_string": changed(dtype=7),
    "shape_too_large": changed(shape=[12, 25]),
    "shape_too_small": changed(shape=[12, 23]),
    "shape_negative": changed(shape=[-12, -24]),
    "shape_fraction": changed(shape=[12.5, 24]),
    "shape_overflows": changed(shape=[1 << 62, 1 << 62]),
    "shape_wraps_to_the_right_size": changed(shape=[1 << 62, 4, 12, 24]),
    "offsets_beyond_file": changed(data_offsets=[0, 1 << 40]),
    "offsets_overflow": changed(data_offsets=[0, (1 << 64) - 1]),
    "offsets_backwards": changed(data_offsets=[1152, 0]),
    "offsets_negative": changed(data_offsets=[-1152, 0]),
    "offsets_overlap": changed(data_offsets=[4, 1156]),
    "offsets_three": changed(data_offsets=[0, 600, 1152]),
    "key_twice": assemble(
        '{"w.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        '"w.weight":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_files_that_are_cut_or_lie(server: Server, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "malformed.safetensors"
    path.write_bytes(content)
    status, errors = quantize(server, Layer(path, "w.weight", path, "x"), tmp_path)
    assert status == REFUSED
    assert str(path) in errors
    assert "INVALID_ARGUMENT" in errors or "OUT_OF_RANGE" in errors or "DATA_LOSS" in errors


def test_random_damage_never_ends_a_client_badly(
    server: Server, layer: Layer, tmp_path: Path, random: np.random.Generator
) -> None:
    """Any byte of the header changed: accepted or refused, but not killed."""
    whole = bytearray(layer.weights_file.read_bytes())
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "damaged.safetensors"
    for position in random.choice(header_bytes, 24, replace=False):
        damaged = whole.copy()
        damaged[position] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        done = certiq(
            "quantize",
            *("--server", server.address),
            *Layer(path, layer.weight, path, layer.x).flags(),
        )
        assert done.returncode in (0, REFUSED), f"byte {position}: {done}"


def test_a_file_of_another_program_is_read(server: Server, tmp_path: Path, layer: Layer) -> None:
    """Metadata, spaces after the header, tensors certiq has no use for."""
    header, data = parts(layer.weights_file.read_bytes())
    header = {"__metadata__": {"format": "pt", "empty": ""}} | header
    header["other"] = {"dtype": "BOOL", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
    text = assemble(header, b"")[8:].decode() + " " * 13
    path = tmp_path / "other.safetensors"
    path.write_bytes(assemble(text, data + b"\1\0\1"))
    status, errors = quantize(server, Layer(path, layer.weight, path, layer.x), tmp_path)
    assert status == 0, errors


# Servers and flags.


def test_a_server_that_is_not_there(layer: Layer) -> None:
    with socket.socket() as taken:
        # Bound and not listening: nobody else gets it, and nobody answers.
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = certiq("quantize", "--server", address, *layer.flags())
    assert done.returncode == REFUSED
    assert "UNAVAILABLE" in done.stderr
    assert address in done.stderr


def test_a_server_that_speaks_something_else(server: Server, layer: Layer) -> None:
    address = f"127.0.0.1:{server.metrics_port}"
    done = certiq("quantize", "--server", address, *layer.flags())
    assert done.returncode == REFUSED
    assert address in done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--no_such_flag"],
        ["--bits", "four"],
        ["--method", "best"],
        ["--symmetric=maybe"],
        ["--damping", "absolute"],
        ["--damping", "some:1"],
        ["--bits"],
    ],
    ids="".join,
)
def test_flags_that_make_no_sense(server: Server, layer: Layer, flags: list[str]) -> None:
    done = certiq("quantize", "--server", server.address, *layer.flags(), *flags)
    assert done.returncode == USAGE
    assert flags[0].split("=")[0] in done.stderr


@pytest.mark.parametrize("missing", ["--server", "--weights", "--weight", "--activations"])
def test_flags_that_are_missing(server: Server, layer: Layer, missing: str) -> None:
    flags = ["--server", server.address, *layer.flags()]
    at = flags.index(missing)
    done = certiq("quantize", *flags[:at], *flags[at + 2 :])
    assert done.returncode == USAGE
    assert missing in done.stderr


def test_no_verb_and_unknown_verbs() -> None:
    assert certiq().returncode == USAGE
    assert certiq("quantise").returncode == USAGE


def test_help_and_version() -> None:
    help_text = certiq("quantize", "--help")
    assert help_text.returncode == 0
    for flag in (
        *("server", "weights", "weight", "activations", "x", "x_quantized", "method", "bits"),
        *("group_size", "symmetric", "group_scales", "scale", "scale_objective"),
        *("scale_passes", "scale_trials", "polish"),
        *("rounding", "seed", "order", "damping", "held_out_fraction", "on_failure", "quality"),
        *("scale_dtype", "format", "compare_nearest", "per_row", "calibration", "output"),
        "report",
    ):
        assert f"--{flag}" in help_text.stdout, flag
    version = certiq("version")
    assert version.returncode == 0
    assert re.search(r"\d+\.\d+\.\d+", version.stdout)
