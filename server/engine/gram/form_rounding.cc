#include "engine/gram/form_rounding.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "engine/gram/quadratic_form.h"
#include "engine/kernels/simd.h"

namespace certiq::engine {
namespace {

constexpr double kFloat32 = 0x1p-24;
constexpr double kFloat64 = 0x1p-53;
// Products and sums of StatisticsAccumulator: 12 + 4 roundings, and one of each factor's where the
// sums are imported and nothing more is known.
constexpr double kNarrow = 18 * kFloat32;
// W - Q in float32 on both sides of the form. With massive tokens it is in float64.
constexpr double kNarrowChange = 2 * kFloat32;

// FormRounding::float32_share, without massive tokens and with them.
constexpr double kFloat32Share = 1e-2;
constexpr double kMassiveShare = 1e-3;

// Rows that are evaluated together: their float64 copies stay small beside the layer.
constexpr int64_t kTogether = 128;

// |X_j| of tokens with float32 products, and of all tokens.
struct Norms {
  std::vector<double> narrow;
  std::vector<double> all;
};

Norms NormsOf(const UpperTriangle<double>& gram, const std::vector<double>& massive, double wide) {
  Norms norms;
  for (int64_t j = 0; j < gram.size(); ++j) {
    const double square = std::max(0.0, gram.at(j, j));
    norms.all.push_back(std::sqrt(square));
    // The difference is of two sums that were rounded each.
    const double others =
        massive.empty() ? square
                        : std::max(0.0, square - massive[static_cast<size_t>(j)]) + wide * square;
    norms.narrow.push_back(std::sqrt(others));
  }
  return norms;
}

// Adds sum_j |row_j| norm_j for every row.
void AddReaches(const StripMatrix& rows, const Norms& norms, Executor& executor, Norms& reaches) {
  constexpr int64_t kWidth = kStrip<float>;
  executor.ParallelFor(rows.strips(), [&](int64_t s) {
    double narrow[kWidth] = {};
    double all[kWidth] = {};
    for (int64_t j = 0; j < rows.features(); ++j) {
      const float* values = rows.strip(s) + j * kWidth;
      const double norm = norms.all[static_cast<size_t>(j)];
      const double narrow_norm = norms.narrow[static_cast<size_t>(j)];
      for (int64_t c = 0; c < kWidth; ++c) {
        const double size = std::abs(static_cast<double>(values[c]));
        all[c] += size * norm;
        narrow[c] += size * narrow_norm;
      }
    }
    for (int64_t c = 0; c < std::min(kWidth, rows.rows() - s * kWidth); ++c) {
      reaches.narrow[static_cast<size_t>(s * kWidth + c)] += narrow[c];
      reaches.all[static_cast<size_t>(s * kWidth + c)] += all[c];
    }
  });
}

}  // namespace

bool HasMassiveTokens(const Statistics& statistics) {
  // Where they are less, float32 leaves nearly the digits that it leaves without them.
  constexpr double kMost = 16;
  const auto has = [](const UpperTriangle<double>& gram, const std::vector<double>& massive) {
    for (size_t j = 0; j < massive.size(); ++j) {
      const auto at = static_cast<int64_t>(j);
      if (massive[j] > 0 && massive[j] >= kMost * (gram.at(at, at) - massive[j])) return true;
    }
    return false;
  };
  if (has(statistics.gram, statistics.massive_squares)) return true;
  return statistics.mismatch.has_value() &&
         has(statistics.mismatch->residual, statistics.mismatch->massive_squares);
}

FormRounding RoundingOfForms(const Statistics& statistics, const StripMatrix& weights,
                             const StripMatrix& change, Executor& executor) {
  // Sums over at most so many terms, then two over features.
  const double wide =
      kFloat64 * static_cast<double>(statistics.tokens + 2 * statistics.features() + 16);
  Norms reaches;
  reaches.narrow.resize(static_cast<size_t>(change.rows()));
  reaches.all.resize(reaches.narrow.size());
  AddReaches(change, NormsOf(statistics.gram, statistics.massive_squares, wide), executor, reaches);
  if (statistics.mismatch.has_value()) {
    const MismatchSums& mismatch = *statistics.mismatch;
    AddReaches(weights, NormsOf(mismatch.residual, mismatch.massive_squares, wide), executor,
               reaches);
  }
  const bool massive = HasMassiveTokens(statistics);
  const double narrow = kNarrow + (massive ? 0 : kNarrowChange);
  FormRounding rounding;
  rounding.float32_share = massive ? kMassiveShare : kFloat32Share;
  for (size_t r = 0; r < reaches.all.size(); ++r) {
    const double square = reaches.all[r] * reaches.all[r];
    rounding.sums.push_back(narrow * reaches.narrow[r] * reaches.narrow[r] + wide * square);
    rounding.float32.push_back(kFloat32 * square);
  }
  return rounding;
}

absl::Status EvaluateRows(const Statistics& statistics, const StripMatrix& weights,
                          const ChangeOfRows& change, const std::vector<int64_t>& rows, Phase phase,
                          const RunContext& context, std::vector<double>& errors) {
  for (auto at = rows.begin(); at < rows.end();) {
    const auto end = at + std::min(kTogether, static_cast<int64_t>(rows.end() - at));
    const std::vector<int64_t> together(at, end);
    const BasicStripMatrix<double> wide =
        statistics.mismatch.has_value() ? Widen(SelectRows(weights, together), *context.executor)
                                        : BasicStripMatrix<double>();
    ASSIGN_OR_RETURN(const std::vector<double> exact,
                     ExactSquaredErrors(statistics, wide, change(together, *context.executor),
                                        nullptr, phase, context));
    for (size_t i = 0; i < together.size(); ++i) {
      errors[static_cast<size_t>(together[i])] = exact[i];
    }
    at = end;
  }
  return absl::OkStatus();
}

absl::Status LiftToRounding(const FormRounding& rounding, std::vector<double>& errors) {
  for (size_t r = 0; r < errors.size(); ++r) {
    if (errors[r] > 0) continue;
    if (errors[r] < -rounding.sums[r]) {
      return base::PreconditionError(
          kImpossibleSums, "calibration_id",
          absl::StrCat("the sums are not those of any activations: for row ", r,
                       " they give the squared norm ", errors[r], ", of which rounding explains ",
                       rounding.sums[r], "; import sums that are positive semidefinite"));
    }
    errors[r] = rounding.sums[r];
  }
  return absl::OkStatus();
}

bool LostByFloat32(const FormRounding& rounding, size_t r, double error) {
  return rounding.float32[r] > rounding.float32_share * error;
}

absl::StatusOr<FormRounding> SettleErrors(const Statistics& statistics, const StripMatrix& weights,
                                          const StripMatrix& change, Phase phase,
                                          const RunContext& context, std::vector<double>& errors) {
  FormRounding rounding = RoundingOfForms(statistics, weights, change, *context.executor);
  std::vector<int64_t> rows;
  for (size_t r = 0; r < errors.size(); ++r) {
    if (LostByFloat32(rounding, r, errors[r])) rows.push_back(static_cast<int64_t>(r));
  }
  RETURN_IF_ERROR(EvaluateRows(
      statistics, weights,
      [&change](const std::vector<int64_t>& some, Executor& executor) {
        return Widen(SelectRows(change, some), executor);
      },
      rows, phase, context, errors));
  RETURN_IF_ERROR(LiftToRounding(rounding, errors));
  return rounding;
}

}  // namespace certiq::engine
