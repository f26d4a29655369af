// Any bytes as the messages of a Quantize call: parsed, converted, checked and taken in, in a small
// budget. Nothing may crash, leak or take memory that the budget did not grant.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <utility>

#include "certiq/v1/quantization_service.pb.h"
#include "contract/convert.h"
#include "contract/rpc_status.h"
#include "engine/quantize_layer.h"
#include "engine/run_context.h"
#include "job/layer_intake.h"
#include "runtime/byte_budget.h"

namespace {

constexpr int64_t kBudget = int64_t{8} << 20;

std::span<const std::byte> AsBytes(const std::string& data) {
  return std::as_bytes(std::span(data.data(), data.size()));
}

// The next message: two bytes of length, then as many bytes as there are.
bool Next(std::span<const uint8_t>& input, certiq::v1::QuantizeRequest& request) {
  if (input.size() < 2) return false;
  const size_t size = std::min<size_t>(input[0] + 256U * input[1], input.size() - 2);
  const bool parsed = request.ParseFromArray(input.data() + 2, static_cast<int>(size));
  input = input.subspan(2 + size);
  return parsed;
}

void Take(certiq::server::LayerIntake& intake, std::span<const uint8_t> input) {
  certiq::v1::QuantizeRequest request;
  while (Next(input, request)) {
    absl::Status status;
    if (request.has_weight()) {
      status =
          intake.AppendWeights(request.weight().row_offset(), AsBytes(request.weight().data()));
    } else if (request.has_activation()) {
      status = intake.AppendActivations(request.activation().row_offset(),
                                        AsBytes(request.activation().x()));
    }
    // Every refusal has to survive the way to the client.
    if (!status.ok()) {
      if (certiq::server::ToGrpc(status).ok()) std::abort();
      return;
    }
  }
  const double fraction = intake.fraction();
  if (!(fraction >= 0 && fraction <= 1)) std::abort();
  absl::StatusOr<certiq::server::ReadyLayer> ready = intake.Finish();
  if (!ready.ok()) return;
  certiq::engine::SerialExecutor executor;
  const auto layer =
      certiq::engine::QuantizeLayer(std::move(ready->problem), {.executor = &executor});
  if (layer.ok()) certiq::server::ToProto(layer->certificate, {});
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::span<const uint8_t> input(data, size);
  certiq::v1::QuantizeRequest first;
  if (!Next(input, first) || !first.has_header()) return 0;
  const auto call = certiq::server::FromProto(first.header());
  if (!call.ok()) {
    if (certiq::server::ToGrpc(call.status()).ok()) std::abort();
    return 0;
  }
  certiq::server::ByteBudget budget(kBudget);
  {
    certiq::engine::SerialExecutor executor;
    const certiq::engine::Cancellation cancelled;
    const auto intake =
        certiq::server::LayerIntake::Create(call->layer, budget, executor, cancelled);
    if (intake.ok()) Take(**intake, input);
  }
  if (budget.reserved() != 0) std::abort();
  return 0;
}
