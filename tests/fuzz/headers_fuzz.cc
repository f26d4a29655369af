// Any bytes as the requests that open calls, and as a file of tokens. The first byte says which.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "certiq/v1/calibration_service.pb.h"
#include "certiq/v1/job_service.pb.h"
#include "jobs/accounts.h"
#include "jobs/calibration.h"
#include "jobs/shared_cache.h"
#include "jobs/store/memory_store.h"
#include "jobs/worker_pool.h"
#include "rpc/convert_calibration.h"
#include "rpc/convert_job.h"
#include "rpc/status.h"
#include "rpc/token_file.h"

namespace {

// Calibrations of both kinds, made once.
struct Surroundings {
  Surroundings() {
    for (const bool mismatched : {false, true}) {
      certiq::jobs::CalibrationRecord record;
      record.id = "calibration";
      record.features = 8;
      record.mismatched = mismatched;
      record.held_out_fraction = mismatched ? 0.1 : 0;
      calibrations[mismatched ? 1 : 0] = std::make_shared<certiq::jobs::Calibration>(
          certiq::jobs::Environment{pool, *store, cache, accounts, certiq::jobs::IgnoreEvents()},
          record, certiq::jobs::ByteBudget::Reservation(), certiq::jobs::ByteBudget::Reservation());
    }
  }
  certiq::jobs::ByteBudget budget{1 << 20};
  certiq::jobs::WorkerPool pool{1, 1};
  std::unique_ptr<certiq::jobs::Store> store = certiq::jobs::NewMemoryStore();
  certiq::jobs::SharedCache cache{pool, budget, 0};
  certiq::jobs::Accounts accounts{budget, budget};
  std::shared_ptr<certiq::jobs::Calibration> calibrations[2];
};

// Every refusal has to survive the way to the client.
void CheckStatus(const absl::Status& status) {
  if (!status.ok() && certiq::rpc::ToGrpc(status).ok()) std::abort();
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
          bytes, [](const auto& request) { return certiq::rpc::FromProto(request); });
      break;
    case 1:
      Try<certiq::v1::AccumulateHeader>(
          bytes, [&](const auto& header) { return certiq::rpc::FromProto(header, mismatched); });
      break;
    case 2:
      Try<certiq::v1::StatisticsHeader>(bytes, [&](const auto& header) {
        return certiq::rpc::FromProto(header, *surroundings.calibrations[mismatched ? 1 : 0]);
      });
      break;
    case 3:
      Try<certiq::v1::CreateJobHeader>(bytes, [](const auto& header) {
        const auto request = certiq::rpc::FromProto(header);
        // What is kept of it is understood after a restart.
        if (request.ok() && !certiq::rpc::JobCodec().DecodeSpec(request->stored_spec).ok()) {
          std::abort();
        }
        return request;
      });
      break;
    case 4:
      CheckStatus(certiq::rpc::JobCodec().DecodeSpec(bytes).status());
      break;
    default: {
      const auto tokens = certiq::rpc::ParseTokens(bytes);
      if (!tokens.ok()) break;
      for (const certiq::rpc::TokenEntry& entry : *tokens) {
        if (entry.tenant.name.empty() || !(entry.read || entry.write)) std::abort();
      }
    }
  }
  return 0;
}
