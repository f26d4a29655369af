"""Who loads which format: one table in the contract, the package, certificates and documents."""

import itertools

import certiq
import numpy as np
import pytest
from certiq import readers
from programs import ROOT

FORMATS = ("dense_f32", "dense_bf16", "gptq", "gptq_v2", "compressed_tensors")


def test_the_package_has_the_contracts_table() -> None:
    own = ROOT / "client" / "python" / "src" / "certiq" / "_proto" / "readers.csv"
    contract = ROOT / "proto" / "certiq" / "v1" / "readers.csv"
    assert own.read_bytes() == contract.read_bytes()
    assert len(readers.lines()) == len(contract.read_text().splitlines()) - 1


def test_documents_and_help_have_it_too() -> None:
    assert readers.table() in (ROOT / "client" / "README.md").read_text("utf-8")
    assert readers.table() in (certiq.loads_in.__doc__ or "")


@pytest.mark.parametrize("format_name", FORMATS)
def test_certificates_say_what_the_table_says(client: certiq.Client, format_name: str) -> None:
    random = np.random.default_rng(3)
    W = random.standard_normal((32, 128), dtype=np.float32)
    X = random.standard_normal((64, 128), dtype=np.float32)
    seen = set()
    for bits, symmetric, group_size, dynamic in itertools.product(
        (2, 4, 5, 8), (True, False), (0, 16, 128), (False, True)
    ):
        if format_name == "gptq" and not symmetric:
            continue
        if format_name == "compressed_tensors" and dynamic and group_size:
            continue
        spec = certiq.Spec(
            method="nearest",
            bits=bits,
            symmetric=symmetric,
            group_size=group_size,
            group_scales="dynamic" if dynamic else "static",
            order="decreasing_norm",
            format=format_name,  # type: ignore[arg-type]
        )
        certificate = client.quantize(W, X, spec).certificate
        found = [
            certiq.Reader(reader.name, reader.versions, reader.checked, reader.note)
            for reader in certificate.loads_in
        ]
        expected = certiq.loads_in(
            format_name,
            bits=bits,
            symmetric=symmetric,
            group_size=group_size,
            reordered_groups=dynamic,
        )
        assert found == expected
        assert any("no reader" in text for text in certificate.warnings) == (not expected)
        seen.add(tuple(reader.name for reader in expected))
    assert len(seen) == {"gptq": 3, "gptq_v2": 3, "compressed_tensors": 2}.get(format_name, 1)


def test_nobody_is_known_for_a_format_that_is_not_there() -> None:
    assert certiq.loads_in("marlin") == []
