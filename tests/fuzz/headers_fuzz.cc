// Any bytes as the requests that open calls, as what they hold, and as a file of tokens. The first
// byte says which.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "certiq/v1/calibration_service.pb.h"
#include "certiq/v1/job_service.pb.h"
#include "certiq/v1/quantization_service.pb.h"
#include "contract/paging.h"
#include "contract/resolve_spec.h"
#include "contract/rpc_status.h"
#include "job/job_request.h"
#include "rpc/calls/grpc_status.h"
#include "rpc/services/convert_calibration.h"
#include "rpc/services/convert_job.h"
#include "rpc/transport/token_file.h"
#include "store/records.h"

namespace {

namespace server = certiq::server;

// Every refusal has to survive the way to the client.
void CheckStatus(const absl::Status& status) {
  if (!status.ok() && server::ToGrpc(status).ok()) std::abort();
}

template <typename Message, typename Read>
void Try(const std::string& bytes, const Read& read) {
  Message message;
  if (message.ParseFromString(bytes)) CheckStatus(read(message).status());
}

// Of 8 features, with rows held out where inputs are mismatched.
server::CalibrationRecord Calibration(bool mismatched) {
  server::CalibrationRecord record;
  record.set_id("calibration");
  record.set_features(8);
  record.set_mismatched(mismatched);
  record.set_held_out_fraction(mismatched ? 0.1 : 0);
  return record;
}

absl::StatusOr<certiq::engine::ResolvedSpec> Resolve(const certiq::v1::QuantizationSpec& spec) {
  const auto resolved = server::ResolveSpec(spec);
  // What a certificate says was decided can be asked for, and is decided so again.
  if (resolved.ok() && resolved->grid == nullptr) {
    const certiq::v1::QuantizationSpec decided = server::ToProto(*resolved);
    const auto again = server::ResolveSpec(decided);
    if (!again.ok() || server::ToProto(*again).SerializeAsString() != decided.SerializeAsString()) {
      std::abort();
    }
  }
  return resolved;
}

template <typename Header>
absl::StatusOr<server::JobRequest> ReadJob(const Header& header) {
  absl::StatusOr<server::JobRequest> request = server::ReadJobRequest(header);
  // What is stored of it is understood after a restart.
  if (request.ok() && !server::ResolveSpec(request->spec_message).ok()) std::abort();
  return request;
}

absl::StatusOr<server::PageRequest> ReadPage(const certiq::v1::ListJobsRequest& request) {
  for (const int state : request.states()) CheckStatus(server::ReadJobState(state).status());
  absl::StatusOr<server::PageRequest> page =
      server::ReadPageRequest(request.page_size(), request.page_token());
  if (page.ok() && (page->size < 1 || page->size > server::kMaxPageSize)) std::abort();
  if (page.ok() && page->after.has_value()) {
    const auto again =
        server::ReadPageRequest(1, server::PageTokenAfter(page->after->first, page->after->second));
    if (!again.ok() || again->after != page->after) std::abort();
  }
  return page;
}

void TryTokens(const std::string& bytes) {
  const auto tokens = server::ParseTokens(bytes);
  if (!tokens.ok()) return;
  for (const server::TokenEntry& entry : *tokens) {
    if (entry.tenant.name.empty() || !(entry.read || entry.write)) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const server::CalibrationRecord calibrations[] = {Calibration(false), Calibration(true)};
  if (size == 0) return 0;
  const std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  const bool mismatched = (data[0] & 0x80) != 0;
  switch (data[0] % 8) {
    case 0:
      Try<certiq::v1::CreateCalibrationRequest>(
          bytes, [](const auto& request) { return server::ReadCreateRequest(request); });
      break;
    case 1:
      Try<certiq::v1::AccumulateHeader>(bytes, [&](const auto& header) {
        return server::ReadAccumulateHeader(header, mismatched);
      });
      break;
    case 2:
      Try<certiq::v1::StatisticsHeader>(bytes, [&](const auto& header) {
        return server::ReadStatisticsHeader(header, calibrations[mismatched ? 1 : 0]);
      });
      break;
    case 3:
      Try<certiq::v1::CreateJobHeader>(bytes, [](const auto& header) { return ReadJob(header); });
      break;
    case 4:
      Try<certiq::v1::QuantizeHeader>(bytes, [](const auto& header) { return ReadJob(header); });
      break;
    case 5:
      Try<certiq::v1::QuantizationSpec>(bytes, [](const auto& spec) { return Resolve(spec); });
      break;
    case 6:
      Try<certiq::v1::ListJobsRequest>(bytes,
                                       [](const auto& request) { return ReadPage(request); });
      break;
    default:
      TryTokens(bytes);
  }
  return 0;
}
