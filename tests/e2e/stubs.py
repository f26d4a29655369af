"""The contract in Python, generated from proto/ when this module is imported."""

import importlib
import sys
import tempfile
from types import ModuleType

from grpc_tools import protoc
from programs import ROOT

_folder = tempfile.TemporaryDirectory(prefix="certiq_stubs_")


def _generate() -> None:
    proto = ROOT / "proto"
    # google/rpc comes with the package googleapis-common-protos.
    files = sorted(str(path.relative_to(proto)) for path in proto.glob("certiq/v1/*.proto"))
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={proto}",
            f"--python_out={_folder.name}",
            f"--grpc_python_out={_folder.name}",
            *files,
        ]
    )
    assert status == 0, "protoc failed"
    sys.path.insert(0, _folder.name)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"certiq.v1.{name}")


_generate()
calibration_pb2 = _module("calibration_service_pb2")
calibration_pb2_grpc = _module("calibration_service_pb2_grpc")
certificate_pb2 = _module("certificate_pb2")
job_pb2 = _module("job_service_pb2")
job_pb2_grpc = _module("job_service_pb2_grpc")
service_pb2 = _module("quantization_service_pb2")
service_pb2_grpc = _module("quantization_service_pb2_grpc")
spec_pb2 = _module("spec_pb2")
tensor_pb2 = _module("tensor_pb2")
