#include "calibration/split_accumulator.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "base/status_macros.h"

namespace certiq::server {
namespace {

using engine::StatisticsAccumulator;
using engine::TokenRows;

// The same rows from `row` on, of `features` elements each.
TokenRows From(const TokenRows& rows, int64_t row, int64_t features) {
  return {rows.dtype, rows.bytes + row * features * engine::ItemSize(rows.dtype), rows.field};
}

}  // namespace

SplitAccumulator::SplitAccumulator(int64_t features, bool mismatched, bool holds_out)
    : fit_(features, mismatched) {
  if (holds_out) held_out_.emplace(features, mismatched);
}

SplitAccumulator::SplitAccumulator(engine::Statistics fit,
                                   std::optional<engine::Statistics> held_out)
    : fit_(std::move(fit)) {
  if (held_out.has_value()) held_out_.emplace(*std::move(held_out));
}

int64_t SplitAccumulator::BytesFor(int64_t features, bool mismatched, bool holds_out) {
  return (holds_out ? 2 : 1) * StatisticsAccumulator::BytesFor(features, mismatched);
}

absl::StatusOr<int64_t> SplitAccumulator::Append(const TokenRows& x, const TokenRows* x_quantized,
                                                 int64_t first_row, int64_t rows, int64_t features,
                                                 const engine::HeldOutSplit& split,
                                                 engine::Executor& executor,
                                                 const engine::Cancellation* cancellation) {
  int64_t held_out_rows = 0;
  for (int64_t begin = 0; begin < rows;) {
    if (cancellation != nullptr && cancellation->cancelled()) return cancellation->status();
    const int64_t row = first_row + begin;
    int64_t block = std::min(StatisticsAccumulator::kBlockRows, rows - begin);
    // Rows that share a block of the split are all to fit or all held out.
    if (held_out_.has_value()) block = std::min(block, split.BlockEnd(row) - row);
    const bool held_out = held_out_.has_value() && split.IsHeldOut(row);
    StatisticsAccumulator& sums = held_out ? *held_out_ : fit_;
    const TokenRows inputs = From(x, begin, features);
    RETURN_IF_ERROR(
        x_quantized == nullptr
            ? sums.Append(inputs, row, block, executor)
            : sums.AppendPair(inputs, From(*x_quantized, begin, features), row, block, executor));
    if (held_out) held_out_rows += block;
    begin += block;
  }
  return held_out_rows;
}

void SplitAccumulator::Add(bool held_out, const engine::Statistics& sums) {
  (held_out ? *held_out_ : fit_).Add(sums);
}

const engine::Statistics& SplitAccumulator::Flush(bool held_out, engine::Executor& executor) {
  return (held_out ? *held_out_ : fit_).Flush(executor);
}

SplitSums SplitAccumulator::Finish(engine::Executor& executor) && {
  SplitSums sums;
  sums.fit = std::make_shared<const engine::Statistics>(std::move(fit_).Finish(executor));
  if (held_out_.has_value()) {
    sums.held_out =
        std::make_shared<const engine::Statistics>(std::move(*held_out_).Finish(executor));
  }
  return sums;
}

}  // namespace certiq::server
