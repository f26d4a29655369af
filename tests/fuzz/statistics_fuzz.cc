// Any bytes as ready-made sums, in pieces of any size.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "calibration/gram_transfer.h"
#include "contract/rpc_status.h"

namespace {

using certiq::server::MatrixLayout;

absl::Status Take(certiq::server::StatisticsImport& import, std::span<const uint8_t> input) {
  while (!input.empty()) {
    const size_t size = std::min<size_t>(input[0] * size_t{8}, input.size() - 1);
    absl::Status taken = import.Append(std::as_bytes(input.subspan(1, size)));
    if (!taken.ok()) return taken;
    input = input.subspan(1 + size);
  }
  return absl::OkStatus();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const int64_t features = 1 + data[0] % 20;
  const bool mismatched = (data[0] & 0x20) != 0;
  const auto dtype =
      (data[0] & 0x40) != 0 ? certiq::engine::DType::kF32 : certiq::engine::DType::kF64;
  const auto layout = (data[0] & 0x80) != 0 ? MatrixLayout::kFull : MatrixLayout::kUpper;
  certiq::server::StatisticsImport import(features, mismatched, dtype, layout);
  const absl::Status taken = Take(import, {data + 1, size - 1});
  if (!taken.ok()) {
    if (certiq::server::ToRpcStatus(taken).code() == 0) std::abort();
    return 0;
  }
  absl::StatusOr<certiq::engine::Statistics> sums = import.Finish(1);
  if (!sums.ok()) return 0;
  if (sums->features() != features || sums->mismatch.has_value() != mismatched) std::abort();
  // All of it comes out again.
  certiq::server::StatisticsExport out(
      std::make_shared<const certiq::engine::Statistics>(*std::move(sums)), features, mismatched,
      MatrixLayout::kFull);
  int64_t elements = 0;
  std::vector<double> values;
  for (out.Next(5, values); !values.empty(); out.Next(5, values)) {
    elements += static_cast<int64_t>(values.size());
  }
  if (elements != (mismatched ? 3 : 1) * features * features) std::abort();
  return 0;
}
