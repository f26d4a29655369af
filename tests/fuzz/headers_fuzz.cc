// Any bytes as the requests that open calls, and as a file of tokens. The first byte says which.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "calibration/calibration.h"
#include "certiq/v1/calibration_service.pb.h"
#include "certiq/v1/job_service.pb.h"
#include "contract/rpc_status.h"
#include "rpc/services/convert_calibration.h"
#include "rpc/services/convert_job.h"
#include "rpc/transport/token_file.h"
#include "runtime/shared_cache.h"
#include "runtime/tenant_quota.h"
#include "runtime/worker_pool.h"
#include "store/memory_store.h"

namespace {

// Calibrations of both kinds, made once.
struct Surroundings {
  Surroundings() {
    for (const bool mismatched : {false, true}) {
      certiq::server::CalibrationRecord record;
      record.id = "calibration";
      record.features = 8;
      record.mismatched = mismatched;
      record.held_out_fraction = mismatched ? 0.1 : 0;
      calibrations[mismatched ? 1 : 0] = std::make_shared<certiq::server::Calibration>(
          certiq::server::Environment{pool, *store, cache, accounts,
                                      certiq::server::IgnoreEvents()},
          record, certiq::server::ByteBudget::Reservation(),
          certiq::server::ByteBudget::Reservation());
    }
  }
  certiq::server::ByteBudget budget{1 << 20};
  certiq::server::WorkerPool pool{1, 1};
  std::unique_ptr<certiq::server::Store> store = certiq::server::NewMemoryStore();
  certiq::server::SharedCache cache{pool, budget, 0};
  certiq::server::Accounts accounts{budget, budget};
  std::shared_ptr<certiq::server::Calibration> calibrations[2];
};

// Every refusal has to survive the way to the client.
void CheckStatus(const absl::Status& status) {
  if (!status.ok() && certiq::server::ToGrpc(status).ok()) std::abort();
}

template <typename Message, typename Convert>
void Try(const std::string& bytes, const Convert& convert) {
  Message message;
  if (message.ParseFromString(bytes)) CheckStatus(convert(message).status());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Surroundings surroundings;
  if (size == 0) return 0;
  const std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  const bool mismatched = (data[0] & 0x80) != 0;
  switch (data[0] % 6) {
    case 0:
      Try<certiq::v1::CreateCalibrationRequest>(
          bytes, [](const auto& request) { return certiq::server::FromProto(request); });
      break;
    case 1:
      Try<certiq::v1::AccumulateHeader>(
          bytes, [&](const auto& header) { return certiq::server::FromProto(header, mismatched); });
      break;
    case 2:
      Try<certiq::v1::StatisticsHeader>(bytes, [&](const auto& header) {
        return certiq::server::FromProto(header, *surroundings.calibrations[mismatched ? 1 : 0]);
      });
      break;
    case 3:
      Try<certiq::v1::CreateJobHeader>(bytes, [](const auto& header) {
        const auto request = certiq::server::FromProto(header);
        // What is kept of it is understood after a restart.
        if (request.ok() && !certiq::server::JobCodec().DecodeSpec(request->stored_spec).ok()) {
          std::abort();
        }
        return request;
      });
      break;
    case 4:
      CheckStatus(certiq::server::JobCodec().DecodeSpec(bytes).status());
      break;
    default: {
      const auto tokens = certiq::server::ParseTokens(bytes);
      if (!tokens.ok()) break;
      for (const certiq::server::TokenEntry& entry : *tokens) {
        if (entry.tenant.name.empty() || !(entry.read || entry.write)) std::abort();
      }
    }
  }
  return 0;
}
