"""Rows of streams and the sums they must come to, in float64."""

from collections.abc import Iterable
from dataclasses import dataclass

import certiq
import numpy as np
from stubs import calibration_pb2, tensor_pb2

F64, F32, F16 = tensor_pb2.DATA_TYPE_F64, tensor_pb2.DATA_TYPE_F32, tensor_pb2.DATA_TYPE_F16
DTYPES = {"<f8": F64, "<f4": F32, "<f2": F16}
FIT, HELD_OUT = calibration_pb2.PORTION_FIT, calibration_pb2.PORTION_HELD_OUT
FULL, UPPER = calibration_pb2.MATRIX_LAYOUT_FULL, calibration_pb2.MATRIX_LAYOUT_UPPER
MATCHED = calibration_pb2.CALIBRATION_KIND_MATCHED
MISMATCHED = calibration_pb2.CALIBRATION_KIND_MISMATCHED

GOLDEN = 0x9E3779B97F4A7C15
BLOCK_ROWS = 256
_64 = (1 << 64) - 1


def _unit(stream_id: str, stratum: int) -> float:
    """u_s in [0, 1): FNV-1a of the name, then SplitMix64's finaliser, its upper 53 bits."""
    x = 0xCBF29CE484222325
    for byte in stream_id.encode():
        x = ((x ^ byte) * 0x100000001B3) & _64
    x = (x + stratum * GOLDEN) & _64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64
    return ((x ^ (x >> 31)) >> 11) * 2.0**-53


def held_out_rows(
    stream_id: str, rows: int, fraction: float, block_rows: int = BLOCK_ROWS
) -> np.ndarray:
    """A mask of the held-out rows of a stream, by the rule of QuantizeHeader.held_out_fraction."""
    blocks = np.zeros(-(-rows // block_rows), bool)
    if fraction > 0:
        for stratum in range(int(len(blocks) * fraction) + 1):
            block = int((stratum + _unit(stream_id, stratum)) // fraction)
            if block < len(blocks):
                blocks[block] = True
    return np.repeat(blocks, block_rows)[:rows]


@dataclass(frozen=True)
class Source:
    """All rows of one stream, and how they are cut into chunks."""

    stream_id: str
    x: np.ndarray
    x_quantized: np.ndarray | None = None
    chunk_rows: int = 32

    @property
    def chunks(self) -> int:
        return -(-len(self.x) // self.chunk_rows)


def integers(
    random: np.random.Generator, rows: int, features: int, dtype: str = "<f4"
) -> np.ndarray:
    """Values whose sums are exact in any order."""
    return random.integers(-8, 9, (rows, features)).astype(dtype)


def made_up(
    random: np.random.Generator,
    stream_id: str,
    rows: int,
    features: int,
    *,
    mismatched: bool = False,
    dtype: str = "<f4",
    chunk_rows: int = 32,
) -> Source:
    x = integers(random, rows, features, dtype)
    quantized = x + random.integers(-1, 2, x.shape).astype(dtype) if mismatched else None
    return Source(stream_id, x, quantized, chunk_rows)


@dataclass(frozen=True)
class Sums:
    """X^T X, and for mismatched inputs X~^T X~ and X~^T X."""

    tokens: int
    parts: tuple[np.ndarray, ...]

    @staticmethod
    def of(x: np.ndarray, x_quantized: np.ndarray | None = None) -> "Sums":
        X = x.astype(np.float64)
        if x_quantized is None:
            return Sums(len(X), (X.T @ X,))
        Q = x_quantized.astype(np.float64)
        return Sums(len(X), (X.T @ X, Q.T @ Q, Q.T @ X))

    @staticmethod
    def nothing(features: int, mismatched: bool) -> "Sums":
        return Sums(0, tuple(np.zeros((features, features)) for _ in range(3 if mismatched else 1)))

    def __add__(self, other: "Sums") -> "Sums":
        parts = zip(self.parts, other.parts, strict=True)
        return Sums(self.tokens + other.tokens, tuple(a + b for a, b in parts))

    def laid_out(self, layout: int, dtype: str) -> list[np.ndarray]:
        """Symmetric parts as upper triangles, row by row, if that is the layout."""
        return [
            (part[np.triu_indices(len(part))] if layout == UPPER and number < 2 else part).astype(
                dtype
            )
            for number, part in enumerate(self.parts)
        ]

    def bytes(self, layout: int = UPPER, dtype: str = "<f8") -> bytes:
        return b"".join(part.tobytes() for part in self.laid_out(layout, dtype))

    @staticmethod
    def exported(calibration: certiq.Calibration, *, held_out: bool = False) -> "Sums":
        """The sums that a calibration holds of one portion."""
        found = calibration.export_statistics(held_out=held_out)
        parts = (found.gram, found.gram_quantized, found.cross)
        return Sums(found.tokens, tuple(part for part in parts if part is not None))

    def import_into(
        self,
        calibration: certiq.Calibration,
        stream_id: str,
        *,
        held_out: bool = False,
        layout: int = UPPER,
        dtype: str = "<f8",
    ) -> bool:
        """Whether they were new."""
        names = ("gram", "gram_quantized", "cross")
        parts = zip(names, self.laid_out(layout, dtype), strict=False)
        return calibration.import_statistics(
            stream_id=stream_id, tokens=self.tokens, held_out=held_out, **dict(parts)
        )

    def assert_equals(self, other: "Sums", what: object = "") -> None:
        """Bounded as the contract bounds sums: 1e-6 sqrt(H_ii H_jj)."""
        assert self.tokens == other.tokens, what
        sizes = [np.sqrt(np.diag(part)) for part in other.parts[:2]]
        for number, (found, expected) in enumerate(zip(self.parts, other.parts, strict=True)):
            rows, columns = (sizes[1], sizes[0]) if number == 2 else (sizes[number],) * 2
            excess = np.abs(found - expected) - 1e-6 * np.outer(rows, columns)
            assert excess.max() <= 0, (what, number, excess.max())


def split_sums(sources: Iterable[Source], fraction: float, block_rows: int) -> tuple[Sums, Sums]:
    """Sums of the rows that are fitted to and of those held out, over all streams."""
    portions: list[list[Sums]] = [[], []]
    for source in sources:
        held_out = held_out_rows(source.stream_id, len(source.x), fraction, block_rows)
        for portion, rows in zip(portions, (~held_out, held_out), strict=True):
            quantized = None if source.x_quantized is None else source.x_quantized[rows]
            portion.append(Sums.of(source.x[rows], quantized))
    fit, kept = portions
    return sum(fit[1:], fit[0]), sum(kept[1:], kept[0])
