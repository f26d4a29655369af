"""The methods of the contract. They take the place of generated stubs, which would add nothing but
a demand for the newest gRPC."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from certiq._proto import calibration_service_pb2 as c
from certiq._proto import job_service_pb2 as j
from certiq._proto import quantization_service_pb2 as q

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


@dataclass(frozen=True)
class Method(Generic[Request, Response]):
    path: str
    request: type[Request]
    response: type[Response]


def serialize(message: Message | bytes) -> bytes:
    """Frames with rows come encoded."""
    return message if isinstance(message, bytes) else message.SerializeToString()


_CALIBRATIONS = "/certiq.v1.CalibrationService/"
_JOBS = "/certiq.v1.JobService/"

QUANTIZE = Method("/certiq.v1.QuantizationService/Quantize", q.QuantizeRequest, q.QuantizeResponse)
CREATE_CALIBRATION = Method(
    _CALIBRATIONS + "CreateCalibration", c.CreateCalibrationRequest, c.Calibration
)
ACCUMULATE = Method(_CALIBRATIONS + "Accumulate", c.AccumulateRequest, c.AccumulateResponse)
IMPORT_STATISTICS = Method(
    _CALIBRATIONS + "ImportStatistics", c.ImportStatisticsRequest, c.ImportStatisticsResponse
)
EXPORT_STATISTICS = Method(
    _CALIBRATIONS + "ExportStatistics", c.ExportStatisticsRequest, c.ExportStatisticsResponse
)
FINALIZE_CALIBRATION = Method(
    _CALIBRATIONS + "FinalizeCalibration", c.FinalizeCalibrationRequest, c.Calibration
)
GET_CALIBRATION = Method(_CALIBRATIONS + "GetCalibration", c.GetCalibrationRequest, c.Calibration)
LIST_CALIBRATIONS = Method(
    _CALIBRATIONS + "ListCalibrations", c.ListCalibrationsRequest, c.ListCalibrationsResponse
)
DELETE_CALIBRATION = Method(_CALIBRATIONS + "DeleteCalibration", c.DeleteCalibrationRequest, Empty)
CREATE_JOB = Method(_JOBS + "CreateJob", j.CreateJobRequest, j.Job)
GET_JOB = Method(_JOBS + "GetJob", j.GetJobRequest, j.Job)
LIST_JOBS = Method(_JOBS + "ListJobs", j.ListJobsRequest, j.ListJobsResponse)
CANCEL_JOB = Method(_JOBS + "CancelJob", j.CancelJobRequest, j.Job)
DELETE_JOB = Method(_JOBS + "DeleteJob", j.DeleteJobRequest, Empty)
WATCH_JOB = Method(_JOBS + "WatchJob", j.WatchJobRequest, j.WatchJobResponse)
READ_RESULT = Method(_JOBS + "ReadResult", j.ReadResultRequest, j.ReadResultResponse)
