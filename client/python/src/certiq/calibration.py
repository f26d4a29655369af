"""Calibrations: the sums of one input space, filled by many streams, each token counted once."""

from collections.abc import Iterable
from types import TracebackType
from typing import Self

from certiq._core import Core
from certiq._proto import calibration_service_pb2 as c
from certiq._rows import RowStream
from certiq._sender import WINDOW_BYTES
from certiq._transport import run
from certiq.errors import Error, NotFound
from certiq.progress import ProgressLike
from certiq.statistics import Statistics, sums_of
from certiq.tensors import TensorLike


class CalibrationInfo:
    """A calibration as it was last seen; the blocking and the asynchronous one extend it."""

    def __init__(self, core: Core, info: c.Calibration, keep: bool) -> None:
        self._core = core
        self.info = info
        """The message of the contract; refresh() asks for a newer one."""
        self.keep = keep
        """True: it outlives the `with` block."""

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def features(self) -> int:
        return self.info.features

    @property
    def mismatched(self) -> bool:
        return self.info.kind == c.CALIBRATION_KIND_MISMATCHED

    @property
    def labels(self) -> list[str]:
        return list(self.info.labels)

    @property
    def tokens(self) -> int:
        """The tokens received, those held out not among them."""
        return self.info.tokens

    @property
    def held_out_tokens(self) -> int:
        return self.info.held_out_tokens

    @property
    def finalized(self) -> bool:
        return self.info.state == c.CALIBRATION_STATE_FINALIZED

    def __repr__(self) -> str:
        state = "finalized" if self.finalized else "open"
        return f"<{type(self).__name__} {self.id}: {state}, {self.tokens} x {self.features}>"

    def _could_not_delete(self, failed: Error, error: BaseException | None) -> None:
        """Reports it at the end of a `with` block; an `error` that ended the block counts more."""
        if isinstance(failed, NotFound):
            return  # Another client deleted it, or it expired.
        if error is None:
            raise failed
        error.add_note(f"and calibration {self.id} could not be deleted: {failed}")


def calibration_id(calibration: CalibrationInfo | str | None) -> str:
    if calibration is None:
        return ""
    return calibration if isinstance(calibration, str) else calibration.id


class StreamInfo:
    """A stream of rows; the blocking and the asynchronous one extend it."""

    def __init__(self, rows: RowStream) -> None:
        self._rows = rows

    @property
    def stream_id(self) -> str:
        return self._rows.stream_id

    @property
    def progress(self) -> c.StreamProgress:
        """The server's position, as its last answer says."""
        return self._rows.progress

    def abort(self) -> None:
        """Ends the call; what the server received stays, and the stream may be taken up again."""
        self._rows.abort()


class ActivationStream(StreamInfo):
    """A resumable writer; what it sends counts once, whatever breaks meanwhile.

    The rows of all send() calls, one after the other, are cut into chunks whatever the sizes of
    the calls, so that the same rows are the same chunks. Where the server has a stream of this
    name already, as many chunks as it has are skipped: a process that was restarted sends the
    same rows again from the first one on, in the same types.
    """

    def send(self, x: TensorLike, x_quantized: TensorLike | None = None) -> None:
        """Adds rows x [..., N], with the same rows of X~ where inputs are mismatched; the memory
        may be used again when it returns. Leading dimensions become one; no rows are no error.
        Waits while more than the window is on its way, or the server out of reach.

        Raises the server's errors, Aborted among them (a newer call took the stream over);
        InvalidArgument where the rows are not like the first ones; FailedPrecondition where what
        the server holds was cut into other chunks; DataLoss where the server lost what it had
        called durable. But for InvalidArgument found here, an error ends the stream.
        """
        run(self._rows.send(x, x_quantized))

    def close(self) -> c.StreamProgress:
        """Sends what is left and waits until all of it is durable. Raises as send(), and
        FailedPrecondition where the server holds more of this stream than was sent now."""
        return run(self._rows.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


class Calibration(CalibrationInfo):
    """The sums of one input space. A context manager, it is deleted at the end of the block,
    unless `keep`."""

    def refresh(self, *, timeout: float | None = None) -> Self:
        self.info = run(self._core.get_calibration(self.id, timeout))
        return self

    def stream(
        self,
        stream_id: str,
        *,
        chunk_rows: int = 0,
        window_bytes: int = WINDOW_BYTES,
        timeout: float | None = None,
    ) -> ActivationStream:
        """A stream of this name, unique within the calibration: the rank, for example.

        `chunk_rows` 0: as many as fit into 1 MiB, at least one; a stream that is taken up again
        must be cut the same way. `window_bytes`: rows that are kept because a crash of the server
        could take them; once there are more, send() waits. `timeout` is for the whole stream.
        """
        rows = RowStream(self._core, self.info, stream_id, chunk_rows, window_bytes, timeout)
        return ActivationStream(rows)

    def import_statistics(
        self,
        *,
        stream_id: str,
        gram: TensorLike,
        tokens: int,
        gram_quantized: TensorLike | None = None,
        cross: TensorLike | None = None,
        held_out: bool = False,
        progress: ProgressLike = None,
        timeout: float | None = None,
    ) -> bool:
        """Adds sums made elsewhere, float64 or float32: once for each stream_id, however often it
        is tried. False: they were there already.

        `gram` is X^T X, [N, N] or its upper triangle [N (N + 1) / 2], row by row; where inputs
        are mismatched `gram_quantized` is X~^T X~, laid out alike, and `cross` X~^T X [N, N],
        element (i, j) of feature i of X~ with feature j of X.
        """
        sums = sums_of(
            self.id,
            stream_id,
            gram=gram,
            tokens=tokens,
            gram_quantized=gram_quantized,
            cross=cross,
            held_out=held_out,
        )
        response = run(self._core.import_statistics(sums, progress, timeout))
        self.info = response.calibration
        return not response.already_committed

    def export_statistics(
        self, *, held_out: bool = False, timeout: float | None = None
    ) -> Statistics:
        """The sums of one portion as they are now."""
        portion = c.PORTION_HELD_OUT if held_out else c.PORTION_FIT
        return run(self._core.export_statistics(self.id, portion, timeout))

    def finalize(
        self,
        *,
        expected_tokens: int | None = None,
        expected_streams: Iterable[str] = (),
        timeout: float | None = None,
    ) -> Self:
        """Ends filling; jobs may use it then. FailedPrecondition where tokens (held-out ones
        included) or streams that are expected are not there, or none at all."""
        self.info = run(self._core.finalize(self.id, expected_tokens, expected_streams, timeout))
        return self

    def delete(self, *, timeout: float | None = None) -> None:
        """FailedPrecondition while a job that has not ended uses it."""
        run(self._core.delete_calibration(self.id, timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.keep:
            return
        try:
            self.delete()
        except Error as failed:
            self._could_not_delete(failed, error)
