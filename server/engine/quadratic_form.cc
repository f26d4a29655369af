#include "engine/quadratic_form.h"

#include <algorithm>
#include <cmath>

#include "engine/simd.h"

namespace certiq::engine {
namespace {

constexpr int64_t kWidth = kStrip<float>;
constexpr int64_t kDepth = 256;

// The exponent that brings the largest diagonal entry, and with it by Cauchy-
// Schwarz every entry, to at most one.
int Exponent(const UpperPanels<double>& s) {
  double largest = 0;
  for (int64_t i = 0; i < s.size(); ++i) largest = std::max(largest, std::abs(s.at(i, i)));
  return largest > 0 ? std::ilogb(largest) + 1 : 0;
}

// Panel p of S as [columns from begin(p)][kPanelRows] float32: the diagonal
// once, what is right of it twice, what is below it zero, so that the full
// form is sum over panels of x_p^T (panel) x.
void ConvertPanel(const UpperPanels<double>& s, int64_t p, int exponent, float* to) {
  const double scale = std::ldexp(1.0, -exponent);
  std::fill_n(to, s.stride(p) * kPanelRows, 0.0f);
  for (int64_t i = 0; i < s.rows(p); ++i) {
    const double* row = s.row(s.begin(p) + i);
    to[i * kPanelRows + i] = static_cast<float>(row[0] * scale);
    for (int64_t j = i + 1; j < s.stride(p); ++j) {
      to[j * kPanelRows + i] = static_cast<float>(2 * row[j - i] * scale);
    }
  }
}

}  // namespace

absl::StatusOr<std::vector<double>> QuadraticForms(const UpperPanels<double>& s,
                                                   const StripMatrix& rows, Phase phase,
                                                   const RunContext& context) {
  std::vector<double> forms(static_cast<size_t>(rows.strips() * kWidth), 0.0);
  std::vector<float> panel(static_cast<size_t>(s.size() * kPanelRows));
  const int exponent = Exponent(s);
  for (int64_t p = 0; p < s.panels(); ++p) {
    if (context.cancelled()) return context.CancellationStatus();
    ConvertPanel(s, p, exponent, panel.data());
    context.executor->ParallelFor(rows.strips(), [&](int64_t strip) {
      alignas(kVectorBytes) float product[kPanelRows * kWidth] = {};
      const float* x = rows.strip(strip) + s.begin(p) * kWidth;
      for (int64_t k0 = 0; k0 < s.stride(p); k0 += kDepth) {
        MultiplyIntoStrip(kPanelRows, std::min(kDepth, s.stride(p) - k0),
                          panel.data() + k0 * kPanelRows, kPanelRows, 1, x + k0 * kWidth, product);
      }
      double* sums = forms.data() + strip * kWidth;
      for (int64_t i = 0; i < s.rows(p); ++i) {
        for (int64_t c = 0; c < kWidth; ++c) {
          sums[c] +=
              static_cast<double>(x[i * kWidth + c]) * static_cast<double>(product[i * kWidth + c]);
        }
      }
    });
    context.Report(phase, static_cast<double>(p + 1) / static_cast<double>(s.panels()));
  }
  forms.resize(static_cast<size_t>(rows.rows()));
  // Rounding may leave a form of a semidefinite S a little below zero.
  for (double& form : forms) form = std::max(0.0, std::ldexp(form, exponent));
  return forms;
}

std::vector<double> ExactQuadraticForms(const UpperPanels<double>& s, const StripMatrix& rows,
                                        const std::vector<int64_t>& chosen,
                                        const RunContext& context) {
  std::vector<double> forms(chosen.size());
  context.executor->ParallelFor(static_cast<int64_t>(chosen.size()), [&](int64_t at) {
    std::vector<float> values(static_cast<size_t>(s.size()));
    rows.GetRow(chosen[static_cast<size_t>(at)], values.data());
    const std::vector<double> x(values.begin(), values.end());
    double form = 0;
    for (int64_t i = 0; i < s.size(); ++i) {
      if (x[i] == 0) continue;
      const double* row = s.row(i);
      double right = 0;
      for (int64_t j = i + 1; j < s.size(); ++j) right += row[j - i] * x[j];
      form += x[i] * (row[0] * x[i] + 2 * right);
    }
    forms[static_cast<size_t>(at)] = form;
  });
  return forms;
}

}  // namespace certiq::engine
