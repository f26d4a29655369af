"""The contract's messages, as the package has them, and its calls as gRPC's stubs have them.

protobuf takes one file of a name in a process, so nothing is generated here. The stubs are for
raw.py: they send whatever they are given and try nothing again.
"""

from types import SimpleNamespace

import grpc
from certiq._proto import calibration_service_pb2 as calibration_pb2
from certiq._proto import certificate_pb2, spec_pb2, tensor_pb2
from certiq._proto import job_service_pb2 as job_pb2
from certiq._proto import quantization_service_pb2 as service_pb2
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor

__all__ = ["calibration_pb2", "certificate_pb2", "job_pb2", "service_pb2", "spec_pb2", "tensor_pb2"]

QUANTIZATION = service_pb2.DESCRIPTOR.services_by_name["QuantizationService"]
CALIBRATIONS = calibration_pb2.DESCRIPTOR.services_by_name["CalibrationService"]
JOBS = job_pb2.DESCRIPTOR.services_by_name["JobService"]


def serialize(message: object) -> bytes:
    """Messages may come encoded."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def stub(channel: grpc.Channel, service: ServiceDescriptor) -> SimpleNamespace:
    """A callable for each method of a service."""
    methods = {}
    for method in service.methods:
        sent, answered = (
            "stream" if streaming else "unary"
            for streaming in (method.client_streaming, method.server_streaming)
        )
        response = message_factory.GetMessageClass(method.output_type)
        methods[method.name] = getattr(channel, f"{sent}_{answered}")(
            f"/{service.full_name}/{method.name}",
            request_serializer=serialize,
            response_deserializer=response.FromString,
        )
    return SimpleNamespace(**methods)
