#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "checks.h"

namespace certiq::verify {
namespace {

std::vector<double> ToStd(const Vector& v) { return {v.begin(), v.end()}; }

// |W - Q|_F^2 with W zero at dead features, which take no part (D3).
double LiveChange(const Layer& layer) {
  double sum = 0;
  for (Eigen::Index j = 0; j < layer.w.cols(); ++j) {
    if (layer.dead[static_cast<size_t>(j)]) continue;
    sum += (layer.w.col(j) - layer.q.levels.col(j)).squaredNorm();
  }
  return sum;
}

void CheckNearest(const Evidence& evidence, VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  const Layer& layer = evidence.layer;
  const auto error = [&](int32_t low, int32_t high) {
    const OutputErrors errors =
        ErrorsOn(layer.fit, layer.w, RoundPlainly(layer, low, high), /*with_residual=*/false);
    return Relative(errors.squared.sum(), errors.energy.sum());
  };
  std::optional<double> expected;
  if (evidence.spec().certificate().compare_nearest()) {
    expected = error(0, layer.q.top);
    // An explicit grid may leave codes out, which the certificate does not say; those used tell.
    const auto [least, most] = std::minmax_element(layer.q.codes.begin(), layer.q.codes.end());
    for (const auto& [low, high] :
         {std::pair(*least, *most), std::pair(*least, layer.q.top), std::pair(int32_t{0}, *most)}) {
      if (std::abs(c.nearest_relative_error() - *expected) <= kPromise * *expected) break;
      if (low > 0 || high < layer.q.top) expected = error(low, high);
    }
  }
  report.OptionalClose("nearest_relative_error", c.has_nearest_relative_error(),
                       c.nearest_relative_error(), expected, kPromise);
}

// A scale in its type.
float RoundScale(v1::DataType type, double scale) {
  const auto narrow = static_cast<float>(scale);
  if (type == v1::DATA_TYPE_F16) return static_cast<float>(Eigen::half(narrow));
  if (type == v1::DATA_TYPE_BF16) return static_cast<float>(Eigen::bfloat16(narrow));
  return narrow;
}

// The layer with steps and zero points of (S1) in place of the result's: what plain rounding has
// that is given no grid.
Layer WithAbsmaxSteps(const Layer& layer, const v1::QuantizationSpec& spec) {
  Layer plain = layer;
  Quantized& q = plain.q;
  std::vector<double> low(q.scale.size(), 0.0);
  std::vector<double> high(q.scale.size(), 0.0);
  for (int64_t r = 0; r < q.rows; ++r) {
    for (int64_t j = 0; j < q.features; ++j) {
      const size_t cell = q.Cell(r, j);
      low[cell] = std::min(low[cell], layer.live_w(r, j));
      high[cell] = std::max(high[cell], layer.live_w(r, j));
    }
  }
  for (size_t cell = 0; cell < low.size(); ++cell) {
    const double span =
        spec.symmetric() ? 2 * std::max(-low[cell], high[cell]) : high[cell] - low[cell];
    q.scale[cell] = span == 0 ? 1 : RoundScale(spec.scale_dtype(), span / q.top);
    const double zero = std::nearbyint(-low[cell] / static_cast<double>(q.scale[cell]));
    q.zero[cell] = spec.symmetric()
                       ? (q.top + 1) / 2
                       : static_cast<int32_t>(std::clamp(zero, 0.0, static_cast<double>(q.top)));
  }
  return plain;
}

// The layer without the features that are dead on the tokens that the search for damping fitted.
Layer HeldOutLayer(const Layer& layer) {
  Layer part = layer;
  if (!layer.held_out_damping) return part;
  const Matrix& fit = layer.fit.inputs();
  const Matrix& held = layer.held_out.inputs();
  for (Eigen::Index j = 0; j < part.w.cols(); ++j) {
    const double squares = fit.col(j).squaredNorm();
    const bool dead = squares - held.col(j).squaredNorm() <= 1e-12 * squares;
    part.dead[static_cast<size_t>(j)] = dead;
    if (dead) part.live_w.col(j).setZero();
  }
  return part;
}

// held_out_nearest_relative_error: of the rows that held_out_relative_error is of.
void CheckHeldOutNearest(const Evidence& evidence, VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  if (evidence.layer.held_out.x.rows() == 0 || c.method() == v1::METHOD_NEAREST) {
    report.OptionalClose("held_out_nearest_relative_error", c.has_held_out_nearest_relative_error(),
                         c.held_out_nearest_relative_error(), std::nullopt, 0);
    return;
  }
  const Layer layer = HeldOutLayer(evidence.layer);
  const auto error = [&](const Layer& grid) {
    const OutputErrors errors = ErrorsOn(layer.held_out, layer.w, RoundPlainly(grid, 0, grid.q.top),
                                         /*with_residual=*/false);
    // Evenly spaced, the first and the last among them (certificate.proto, held_out_rows).
    double squared = 0;
    double energy = 0;
    const int64_t all = layer.w.rows();
    const int64_t count = std::clamp<int64_t>(c.held_out_rows(), 1, all);
    for (int64_t i = 0; i < count; ++i) {
      const auto r = static_cast<Eigen::Index>(i * all / count);
      squared += errors.squared[r];
      energy += errors.energy[r];
    }
    return Relative(squared, energy);
  };
  double expected = error(WithAbsmaxSteps(layer, evidence.spec()));
  if (c.has_held_out_nearest_relative_error() &&
      std::abs(c.held_out_nearest_relative_error() - expected) > kPromise * expected) {
    // A grid that was given, which the certificate does not say, is that of plain rounding too.
    expected = error(layer);
  }
  report.OptionalClose("held_out_nearest_relative_error", c.has_held_out_nearest_relative_error(),
                       c.held_out_nearest_relative_error(), expected, kPromise);
}

// (R1): at least what float64 sums leave, at most what float32 products of all tokens may leave;
// between the two where there are massive tokens, of which a stream's blocks decide.
void CheckSumRounding(const Evidence& evidence, VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  const std::vector<Range> errors = FormRoundings(evidence, /*energies=*/false);
  const std::vector<Range> energies = FormRoundings(evidence, /*energies=*/true);
  const auto total = [&](const char* name, double certified, const std::vector<Range>& rows) {
    Range sum;
    for (const Range& row : rows) {
      sum.low += row.low;
      sum.high += row.high;
    }
    report.Number(name, certified, sum.high, sum);
  };
  total("squared_error_rounding", c.squared_error_rounding(), errors);
  total("reference_energy_rounding", c.reference_energy_rounding(), energies);
  if (!evidence.spec().certificate().per_row()) {
    report.Count("row_rounding", c.row_rounding_size(), 0, 0);
    return;
  }
  std::vector<double> expected;
  expected.reserve(errors.size());
  for (const Range& row : errors) expected.push_back(row.high);
  report.Rows("row_rounding", {c.row_rounding().begin(), c.row_rounding().end()}, expected, errors);
}

// The result before polishing is not stored, so that only the sum over rows can be compared.
void CheckPolish(const Evidence& evidence, VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  const bool polished = evidence.spec().polish() > 0 && c.outcome() == v1::OUTCOME_QUANTIZED;
  if (c.has_polish() != polished) {
    report.Claim("polish", false,
                 polished ? "missing, though the spec has some" : "there, though there was none");
    return;
  }
  if (!polished) return;
  report.Count("polish.passes", c.polish().passes(), 1, evidence.spec().polish());
  const double before = c.polish().damped_squared_error_before();
  report.Claim("polish.damped_squared_error_before", before >= c.damped_squared_error(),
               absl::StrFormat("%.6g, %.6g afterwards", before, c.damped_squared_error()));
  report.NotChecked("how much polish gained", "what was there before is not stored");
}

}  // namespace

void CheckErrors(const Evidence& evidence, VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  const Layer& layer = evidence.layer;
  const OutputErrors& errors = evidence.errors;
  const double squared = errors.squared.sum();
  const double energy = errors.energy.sum();
  CheckSumRounding(evidence, report);
  // Where the certificate grants itself more than float32 sums may be off, the line above says so.
  const double rounding = c.squared_error_rounding();
  report.Number("squared_error", c.squared_error(), squared,
                Around(squared, evidence.tolerance(), rounding));
  const double lambda = evidence.feedback.has_value() ? c.lambda_used() : 0;
  const double damped = squared + lambda * LiveChange(layer);
  report.Number("damped_squared_error", c.damped_squared_error(), damped,
                Around(damped, evidence.tolerance(), rounding));
  CheckPolish(evidence, report);
  report.Number("reference_energy", c.reference_energy(), energy,
                Around(energy, kPromise, c.reference_energy_rounding()));
  const double relative = Relative(squared, energy);
  report.Number(
      "relative_error", c.relative_error(), relative,
      {Relative(std::max(0.0, squared - rounding), energy + c.reference_energy_rounding()) *
           (1 - evidence.tolerance()),
       Relative(squared + rounding, std::max(0.0, energy - c.reference_energy_rounding())) *
           (1 + evidence.tolerance())});
  CheckNearest(evidence, report);
  const std::vector<double> rows = ToStd(errors.squared.cwiseSqrt());
  if (evidence.spec().certificate().per_row()) {
    std::vector<Range> ranges;
    ranges.reserve(rows.size());
    // Errors of weights near the least float32 were rounded to the numbers there are.
    const double least = 0x1p-126 * std::sqrt(layer.gram.trace());
    for (size_t r = 0; r < rows.size(); ++r) {
      const double row_rounding =
          r < static_cast<size_t>(c.row_rounding_size()) ? c.row_rounding(static_cast<int>(r)) : 0;
      const double square = rows[r] * rows[r];
      ranges.push_back(
          {std::sqrt(std::max(0.0, square - row_rounding)) * (1 - evidence.tolerance()) - least,
           std::sqrt(square + row_rounding) * (1 + evidence.tolerance()) + least});
    }
    report.Rows("row_error", {c.row_error().begin(), c.row_error().end()}, rows, ranges);
  } else {
    report.Count("row_error", c.row_error_size(), 0, 0);
  }
  CheckHeldOutNearest(evidence, report);
  if (layer.held_out_damping) return;
  std::optional<double> held_out;
  if (layer.held_out.x.rows() > 0) {
    const OutputErrors unseen =
        ErrorsOn(layer.held_out, layer.w, layer.q.levels, /*with_residual=*/false);
    held_out = Relative(unseen.squared.sum(), unseen.energy.sum());
  }
  report.OptionalClose("held_out_relative_error", c.has_held_out_relative_error(),
                       c.held_out_relative_error(), held_out, kPromise);
}

}  // namespace certiq::verify
