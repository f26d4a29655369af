"""Exceptions: one class a status code of gRPC, with the details of the server's answer."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import grpc
from google.protobuf import any_pb2, message
from google.rpc import error_details_pb2, status_pb2

DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True)
class FieldViolation:
    """A field of the request that is at fault (google.rpc.BadRequest), such as "spec.bits"."""

    field: str
    description: str


@dataclass(frozen=True)
class PreconditionViolation:
    """Something that has to change first (google.rpc.PreconditionFailure)."""

    type: str
    subject: str
    description: str


class Error(Exception):
    """A call that failed: on the server, on the way, or here before anything was sent.

    `code` is gRPC's. `retry_delay` is when the server suggests to try again, in seconds; the
    client did so already, as often as its Retry allows.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        violations: Iterable[FieldViolation] = (),
        preconditions: Iterable[PreconditionViolation] = (),
        retry_delay: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.violations = tuple(violations)
        self.preconditions = tuple(preconditions)
        self.retry_delay = retry_delay

    @property
    def field(self) -> str | None:
        """The first field at fault."""
        return self.violations[0].field if self.violations else None

    @property
    def reason(self) -> str:
        """The first violation's description, of a field or a precondition; else the message."""
        if self.violations:
            return self.violations[0].description
        if self.preconditions:
            return self.preconditions[0].description
        return self.message

    def with_suffix(self, suffix: str) -> "Error":
        """The same error with more to its message."""
        return type(self)(
            self.message + suffix,
            code=self.code,
            violations=self.violations,
            preconditions=self.preconditions,
            retry_delay=self.retry_delay,
        )

    def of(self, name: str) -> "Error":
        """The same error, its message beginning with what it is about, such as a linear's name."""
        return type(self)(
            f"{name}: {self.message}",
            code=self.code,
            violations=self.violations,
            preconditions=self.preconditions,
            retry_delay=self.retry_delay,
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.__dict__.copy())


def _rebuild(kind: type[Error], message: str, state: dict[str, object]) -> Error:
    """Errors travel between processes, for example of a process pool."""
    error = kind(message)
    error.__dict__.update(state)
    return error


class Cancelled(Error):
    """The call or the job was cancelled."""

    code = grpc.StatusCode.CANCELLED


class InvalidArgument(Error, ValueError):
    """A field, a size or a value is wrong; `field` names it."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class DeadlineExceeded(Error, TimeoutError):
    """The time given to the call, or to the job, is over."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class NotFound(Error, LookupError):
    """No such calibration or job, or it belongs to somebody else."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(Error):
    """The request_id was used with other content."""

    code = grpc.StatusCode.ALREADY_EXISTS


class PermissionDenied(Error):
    """The token lacks the scope."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(Error):
    """No valid token, where the server asks for one."""

    code = grpc.StatusCode.UNAUTHENTICATED


class ResourceExhausted(Error):
    """The queue, a budget, a quota or the disk is full (`retry_delay`), or a message too large."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class FailedPrecondition(Error):
    """Something has to change first; `preconditions` say what."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(Error):
    """A newer call took the stream over."""

    code = grpc.StatusCode.ABORTED


class OutOfRange(Error):
    """A position beyond the end."""

    code = grpc.StatusCode.OUT_OF_RANGE


class Unimplemented(Error):
    """A value of the contract that this server does not offer."""

    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(Error):
    """A defect of the server, or an answer that breaks the contract."""

    code = grpc.StatusCode.INTERNAL


class Unavailable(Error):
    """No server could be reached, or it drains."""

    code = grpc.StatusCode.UNAVAILABLE


class DataLoss(Error):
    """A stored file is damaged, an answer stopped short, or the server lost what was durable."""

    code = grpc.StatusCode.DATA_LOSS


_BY_CODE: dict[grpc.StatusCode, type[Error]] = {
    kind.code: kind
    for kind in (
        *(Cancelled, InvalidArgument, DeadlineExceeded, NotFound, AlreadyExists),
        *(PermissionDenied, Unauthenticated, ResourceExhausted, FailedPrecondition, Aborted),
        *(OutOfRange, Unimplemented, Internal, Unavailable, DataLoss),
    )
}
_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def _printable(text: str) -> str:
    """A text of the server's, fit for a terminal and for one line of a log: it may repeat what
    another client sent."""
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "backslashreplace").decode()
        for character in text
    )


class _Details:
    """The google.rpc details that are known; the others and broken ones are left out, for they
    must not hide the error they came with."""

    known: ClassVar = {
        f"type.googleapis.com/{kind.DESCRIPTOR.full_name}": kind
        for kind in (
            error_details_pb2.BadRequest,
            error_details_pb2.PreconditionFailure,
            error_details_pb2.RetryInfo,
        )
    }

    def __init__(self, details: Iterable[any_pb2.Any]) -> None:
        self.violations: list[FieldViolation] = []
        self.preconditions: list[PreconditionViolation] = []
        self.retry_delay: float | None = None
        for packed in details:
            kind = self.known.get(packed.type_url)
            if kind is None:
                continue
            try:
                detail = kind.FromString(packed.value)
            except message.DecodeError:
                continue
            if isinstance(detail, error_details_pb2.BadRequest):
                self.violations += [
                    FieldViolation(_printable(v.field), _printable(v.description))
                    for v in detail.field_violations
                ]
            elif isinstance(detail, error_details_pb2.PreconditionFailure):
                self.preconditions += [
                    PreconditionViolation(
                        _printable(v.type), _printable(v.subject), _printable(v.description)
                    )
                    for v in detail.violations
                ]
            else:
                delay = detail.retry_delay
                self.retry_delay = max(0.0, delay.seconds + delay.nanos * 1e-9)


def from_status(status: status_pb2.Status) -> Error:
    """The exception of a google.rpc.Status that is not OK, such as why a job failed."""
    # A code of a newer gRPC becomes UNKNOWN.
    code = _BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    details = _Details(status.details)
    return _BY_CODE.get(code, Error)(
        _printable(status.message),
        code=code,
        violations=details.violations,
        preconditions=details.preconditions,
        retry_delay=details.retry_delay,
    )


def from_rpc_error(error: Any) -> Error:
    """The exception of a call of gRPC, of either kind, that failed."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                status.ParseFromString(value)
            except message.DecodeError:
                status.Clear()
    # The details may contradict the call, whose own code and message hold.
    status.code = error.code().value[0]
    status.message = error.details() or ""
    return from_status(status)


def invalid(field: str, description: str) -> InvalidArgument:
    """An error found here that names a field as a server's would."""
    return InvalidArgument(
        f"{field}: {description}", violations=[FieldViolation(field, description)]
    )


def broken(description: str) -> Internal:
    """The server's answer is not what the contract says."""
    return Internal(f"the server's answer breaks the contract: {description}")
