"""The contract as the package has it, for the oracle of tests/e2e."""

from certiq._proto import calibration_service_pb2 as calibration_pb2
from certiq._proto import certificate_pb2, spec_pb2, tensor_pb2
from certiq._proto import job_service_pb2 as job_pb2

__all__ = ["calibration_pb2", "certificate_pb2", "job_pb2", "spec_pb2", "tensor_pb2"]
