// Any bytes as the message of a call with one request, cut into two slices as a network might: what
// is accepted holds nothing that the server does not know and no text without end.

#include <google/protobuf/message.h>
#include <google/protobuf/unknown_field_set.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "certiq/v1/calibration_service.pb.h"
#include "certiq/v1/job_service.pb.h"
#include "contract/rpc_status.h"
#include "rpc/calls/messages.h"

namespace {

namespace server = certiq::server;
namespace v1 = certiq::v1;

template <typename Message>
void Try(const grpc::ByteBuffer& bytes) {
  const absl::StatusOr<Message> message = server::Parse<Message>(bytes, "a request");
  if (!message.ok()) {
    if (!absl::IsInvalidArgument(message.status())) std::abort();
    if (server::ToRpcStatus(message.status()).ByteSizeLong() > 8192) std::abort();
    return;
  }
  const auto& unknown = message->GetReflection()->GetUnknownFields(*message);
  if (!unknown.empty()) std::abort();
  // What was accepted is the same again.
  grpc::ByteBuffer again;
  if (!server::Serialize(*message, &again).ok()) std::abort();
  if (!server::Parse<Message>(again, "a request").ok()) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const size_t first = std::min<size_t>(data[1], size - 2);
  const std::array<grpc::Slice, 2> slices = {grpc::Slice(data + 2, first),
                                             grpc::Slice(data + 2 + first, size - 2 - first)};
  const grpc::ByteBuffer bytes(slices.data(), slices.size());
  switch (data[0] % 8) {
    case 0:
      Try<v1::CreateCalibrationRequest>(bytes);
      break;
    case 1:
      Try<v1::FinalizeCalibrationRequest>(bytes);
      break;
    case 2:
      Try<v1::ListCalibrationsRequest>(bytes);
      break;
    case 3:
      Try<v1::ExportStatisticsRequest>(bytes);
      break;
    case 4:
      Try<v1::GetJobRequest>(bytes);
      break;
    case 5:
      Try<v1::ListJobsRequest>(bytes);
      break;
    case 6:
      Try<v1::ReadResultRequest>(bytes);
      break;
    default:
      Try<v1::CreateJobRequest>(bytes);
      break;
  }
  return 0;
}
