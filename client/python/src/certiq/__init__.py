"""Client of certiq: post-training quantization as a service, with a certificate.

    import certiq

    with certiq.Client("127.0.0.1:8470") as client:
        layer = client.quantize(weight, activations, certiq.Spec(bits=4, order="decreasing_norm"))
    layer.dequantized(), layer.certificate.relative_error

certiq.aio has the same for asyncio.
"""

from certiq import aio
from certiq._channel import Tls
from certiq._proto.certificate_pb2 import Certificate
from certiq.calibration import ActivationStream, Calibration
from certiq.client import Client
from certiq.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    Error,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    PreconditionViolation,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from certiq.jobs import Job
from certiq.layer import Layer
from certiq.readers import Reader, loads_in
from certiq.retry import Retry
from certiq.spec import Grid, Spec
from certiq.statistics import Statistics

__version__ = "0.1.0"

__all__ = [
    "Aborted",
    "ActivationStream",
    "AlreadyExists",
    "Calibration",
    "Cancelled",
    "Certificate",
    "Client",
    "DataLoss",
    "DeadlineExceeded",
    "Error",
    "FailedPrecondition",
    "FieldViolation",
    "Grid",
    "Internal",
    "InvalidArgument",
    "Job",
    "Layer",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "PreconditionViolation",
    "Reader",
    "ResourceExhausted",
    "Retry",
    "Spec",
    "Statistics",
    "Tls",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "aio",
    "loads_in",
]
