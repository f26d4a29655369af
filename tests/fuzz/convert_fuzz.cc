// Any bytes as the messages of a Quantize call: parsed, read, admitted and taken in, in a small
// budget. Nothing may crash, leak or take memory that the budget did not grant.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "calibration/calibration_desk.h"
#include "certiq/v1/quantization_service.pb.h"
#include "contract/certificate.h"
#include "contract/rpc_status.h"
#include "engine/quantize_layer.h"
#include "engine/run_context.h"
#include "job/admission.h"
#include "job/job_request.h"
#include "job/upload.h"
#include "runtime/byte_budget.h"
#include "runtime/shared_cache.h"
#include "runtime/tenant_quota.h"
#include "runtime/worker_pool.h"
#include "store/storage.h"

namespace {

namespace server = certiq::server;

constexpr int64_t kBudget = int64_t{8} << 20;

// What uploads work with, made once. There is one place in the queue: an upload that keeps it is
// found out by the next.
struct Surroundings {
  server::ByteBudget budget{kBudget};
  server::WorkerPool pool{1, 1};
  const server::Storage storage = *server::OpenStorage("");
  server::SharedCache cache{pool, budget, 0};
  server::TenantQuotas quotas{budget, budget};
  const server::Environment environment{pool, storage, cache, quotas, server::IgnoreEvents()};
  server::CalibrationDesk calibrations{environment, std::chrono::milliseconds(5000)};
};

std::span<const std::byte> AsBytes(const std::string& data) {
  return std::as_bytes(std::span(data.data(), data.size()));
}

// Every refusal has to survive the way to the client.
void CheckRefusal(const absl::Status& status) {
  const google::rpc::Status wire = server::ToRpcStatus(status);
  if (status.ok() || wire.code() == 0) std::abort();
  if (!google::rpc::Status().ParseFromString(wire.SerializeAsString())) std::abort();
}

// The next message: two bytes of length, then as many bytes as there are.
bool Next(std::span<const uint8_t>& input, certiq::v1::QuantizeRequest& request) {
  if (input.size() < 2) return false;
  const size_t size = std::min<size_t>(input[0] + 256U * input[1], input.size() - 2);
  const bool parsed = request.ParseFromArray(input.data() + 2, static_cast<int>(size));
  input = input.subspan(2 + size);
  return parsed;
}

void Take(server::Upload& upload, std::span<const uint8_t> input) {
  certiq::v1::QuantizeRequest request;
  while (Next(input, request)) {
    absl::Status status;
    if (request.has_weight()) {
      status =
          upload.AppendWeights(request.weight().row_offset(), AsBytes(request.weight().data()));
    } else if (request.has_activation()) {
      status = upload.AppendActivations(request.activation().row_offset(),
                                        AsBytes(request.activation().x()),
                                        AsBytes(request.activation().x_quantized()));
    }
    if (!status.ok()) {
      CheckRefusal(status);
      return;
    }
    const double fraction = upload.fraction();
    if (!(fraction >= 0 && fraction <= 1)) std::abort();
  }
  if (const absl::Status finished = upload.Finish(); !finished.ok()) {
    CheckRefusal(finished);
    return;
  }
  server::SplitSums sums = upload.TakeSums();
  certiq::engine::LayerProblem problem;
  problem.spec = upload.request().spec;
  problem.weights = upload.TakeWeights();
  problem.statistics = std::move(sums.fit);
  problem.held_out = std::move(sums.held_out);
  certiq::engine::SerialExecutor executor;
  const auto layer = certiq::engine::QuantizeLayer(std::move(problem), {.executor = &executor});
  if (layer.ok()) server::ToProto(layer->certificate, upload.facts());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static Surroundings surroundings;
  std::span<const uint8_t> input(data, size);
  certiq::v1::QuantizeRequest first;
  if (!Next(input, first) || !first.has_header()) return 0;
  absl::StatusOr<server::JobRequest> request = server::ReadJobRequest(first.header());
  if (!request.ok()) {
    CheckRefusal(request.status());
    return 0;
  }
  {
    const certiq::engine::Cancellation cancelled;
    absl::StatusOr<server::Admission> admission =
        server::Admit(surroundings.environment, surroundings.calibrations, {}, *request);
    if (admission.ok()) {
      server::Upload upload(surroundings.environment, *std::move(request), *std::move(admission),
                            cancelled, std::nullopt);
      Take(upload, input);
    } else {
      CheckRefusal(admission.status());
    }
  }
  if (surroundings.budget.reserved() != 0) std::abort();
  if (!surroundings.pool.Admit().ok()) std::abort();
  return 0;
}
