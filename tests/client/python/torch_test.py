"""Tensors of torch, without a detour."""

from typing import Any

import certiq
import numpy as np
import pytest
from certiq import tensors

torch: Any = pytest.importorskip("torch", reason="torch is not installed; see tests/README.md")


def made_up(rows: int, features: int, dtype: Any) -> Any:  # noqa: ANN401
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, features, generator=generator).to(dtype)


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16"])
def test_a_layer(client: certiq.Client, kind: str) -> None:
    dtype = getattr(torch, kind)
    W = torch.nn.Parameter(made_up(16, 64, dtype))
    X = made_up(300, 64, dtype)
    layer = client.quantize(W, X, certiq.Spec(bits=4, format="dense_bf16"))
    Q = layer.torch()["weight"]
    assert Q.dtype == torch.bfloat16
    reference = X.double() @ W.detach().double().T
    error = torch.linalg.norm(reference - X.double() @ Q.double().T) / torch.linalg.norm(reference)
    assert layer.relative_error == pytest.approx(float(error), rel=1e-4)
    # The same bytes as numpy would have sent.
    same = client.quantize(W.detach().float().numpy(), X.float().numpy())
    if kind == "float32":
        assert same.certificate.x_sha256 == layer.certificate.x_sha256
    np.testing.assert_array_equal(Q.float().numpy(), layer.dequantized())


def test_rows_of_a_stream(client: certiq.Client) -> None:
    X = made_up(400, 64, torch.bfloat16)
    with client.calibration(64) as calibration:
        with calibration.stream("rank-0") as stream:
            # A batch of sequences; every second row; transposed.
            stream.send(X[:200].reshape(2, 100, 64))
            stream.send(torch.stack([X[200:300], X[200:300]], 1).reshape(200, 64)[::2])
            stream.send(X[300:].T.contiguous().T)
            stream.send(X[:0])
        found = calibration.export_statistics()
    assert found.tokens == 400
    gram = (X.double().T @ X.double()).numpy()
    np.testing.assert_allclose(found.gram, gram, rtol=1e-5, atol=1e-4)


def test_sums_made_by_torch(client: certiq.Client) -> None:
    X = made_up(400, 64, torch.float32)
    with client.calibration(64) as calibration:
        calibration.import_statistics(stream_id="a", gram=X.double().T @ X.double(), tokens=400)
        found = calibration.export_statistics()
    np.testing.assert_allclose(found.gram, (X.double().T @ X.double()).numpy(), rtol=1e-12)


def test_memory_is_shared() -> None:
    X = made_up(40, 64, torch.bfloat16)
    rows = np.frombuffer(tensors.matrix("x", X).rows(3, 9), "<u2")
    assert rows.ctypes.data == X[3:9].data_ptr()


@pytest.mark.parametrize(
    "value",
    [
        lambda: torch.zeros(4, 4, dtype=torch.bool),
        lambda: torch.zeros(4, 4, dtype=torch.complex64),
        lambda: torch.eye(4).to_sparse(),
    ],
)
def test_what_is_no_tensor_of_the_contract(client: certiq.Client, value: Any) -> None:  # noqa: ANN401
    with pytest.raises(certiq.InvalidArgument) as caught:
        client.quantize(made_up(4, 4, torch.float32), value())
    assert caught.value.field == "x"
