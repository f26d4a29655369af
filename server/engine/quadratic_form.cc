#include "engine/quadratic_form.h"

#include <algorithm>
#include <cmath>

#include "engine/simd.h"

namespace certiq::engine {
namespace {

constexpr int64_t kDepth = 256;

// The exponent that brings the largest diagonal entry, and with it by Cauchy-
// Schwarz every entry, to at most one.
int Exponent(const UpperPanels<double>& s) {
  double largest = 0;
  for (int64_t i = 0; i < s.size(); ++i) largest = std::max(largest, std::abs(s.at(i, i)));
  return largest > 0 ? std::ilogb(largest) + 1 : 0;
}

// Strips whose products pass over a slice of the panel while it is in a second-level cache.
constexpr int64_t kTileStrips = 4;
// With few strips every thread gets some all the same.
constexpr int64_t kWantedTiles = 8;
constexpr int64_t kGroups = kPanelRows / kMicroRows;

// Columns [k0, k0 + columns) of panel p of S as the kernel reads them, kMicroRows rows i at a time:
// [i / kMicroRows][k][i % kMicroRows]. The diagonal once, what is right of it twice, what is below
// it and beyond the last row zero, so that the full form is sum over panels of x_p^T (panel) x.
template <typename T>
void ConvertSlice(const UpperPanels<double>& s, int64_t p, int64_t k0, int64_t columns, int exponent,
                  T* to) {
  const double once = std::ldexp(1.0, -exponent);
  for (int64_t g = 0; g < kGroups; ++g) {
    for (int64_t lane = 0; lane < kMicroRows; ++lane) {
      const int64_t i = g * kMicroRows + lane;
      T* out = to + g * columns * kMicroRows + lane;
      if (i >= s.rows(p)) {
        for (int64_t k = 0; k < columns; ++k) out[k * kMicroRows] = 0;
        continue;
      }
      const double* from = s.panel(p) + i * s.stride(p) + k0;
      for (int64_t k = 0; k < columns; ++k) {
        const double times = k0 + k > i ? 2 * once : once;
        out[k * kMicroRows] = k0 + k < i ? T{0} : static_cast<T>(times * from[k]);
      }
    }
  }
}

void ClampAtZero(std::vector<double>& forms) {
  // Rounding may leave a form of a semidefinite S a little below zero.
  for (double& form : forms) form = std::max(0.0, form);
}

}  // namespace

template <typename T>
absl::StatusOr<std::vector<double>> QuadraticForms(const UpperPanels<double>& s,
                                                   const BasicStripMatrix<T>& rows, Phase phase,
                                                   const RunContext& context) {
  constexpr int64_t kWidth = kStrip<T>;
  std::vector<double> forms(static_cast<size_t>(rows.strips() * kWidth), 0.0);
  UnsetVector<T> panel(static_cast<size_t>(s.size() * kPanelRows));
  const int exponent = Exponent(s);
  const int64_t tile_strips = std::clamp<int64_t>(rows.strips() / kWantedTiles, 1, kTileStrips);
  const int64_t tiles = (rows.strips() + tile_strips - 1) / tile_strips;
  for (int64_t p = 0; p < s.panels(); ++p) {
    if (context.cancelled()) return context.CancellationStatus();
    const int64_t depth = s.stride(p);
    context.executor->ParallelFor((depth + kDepth - 1) / kDepth, [&](int64_t slice) {
      const int64_t k0 = slice * kDepth;
      ConvertSlice(s, p, k0, std::min(kDepth, depth - k0), exponent, panel.data() + k0 * kPanelRows);
    });
    context.executor->ParallelFor(tiles, [&](int64_t tile) {
      const int64_t first = tile * tile_strips;
      const int64_t last = std::min(first + tile_strips, rows.strips());
      AlignedVector<T> products(static_cast<size_t>((last - first) * kPanelRows * kWidth));
      for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
        const int64_t columns = std::min(kDepth, depth - k0);
        for (int64_t strip = first; strip < last; ++strip) {
          const T* x = rows.strip(strip) + (s.begin(p) + k0) * kWidth;
          T* product = products.data() + (strip - first) * kPanelRows * kWidth;
          for (int64_t g = 0; g < kGroups; ++g) {
            MultiplyIntoStrip(kMicroRows, columns,
                              panel.data() + k0 * kPanelRows + g * columns * kMicroRows,
                              int64_t{kMicroRows}, int64_t{1}, x,
                              product + g * kMicroRows * kWidth);
          }
        }
      }
      for (int64_t strip = first; strip < last; ++strip) {
        const T* x = rows.strip(strip) + s.begin(p) * kWidth;
        const T* product = products.data() + (strip - first) * kPanelRows * kWidth;
        double* sums = forms.data() + strip * kWidth;
        for (int64_t i = 0; i < s.rows(p); ++i) {
          for (int64_t c = 0; c < kWidth; ++c) {
            sums[c] += static_cast<double>(x[i * kWidth + c]) *
                       static_cast<double>(product[i * kWidth + c]);
          }
        }
      }
    });
    context.Report(phase, static_cast<double>(p + 1) / static_cast<double>(s.panels()));
  }
  forms.resize(static_cast<size_t>(rows.rows()));
  for (double& form : forms) form = std::ldexp(form, exponent);
  ClampAtZero(forms);
  return forms;
}

template absl::StatusOr<std::vector<double>> QuadraticForms(const UpperPanels<double>& s,
                                                            const BasicStripMatrix<float>& rows,
                                                            Phase phase, const RunContext& context);
template absl::StatusOr<std::vector<double>> QuadraticForms(const UpperPanels<double>& s,
                                                            const BasicStripMatrix<double>& rows,
                                                            Phase phase, const RunContext& context);

absl::StatusOr<BasicStripMatrix<double>> TimesSquare(const BasicStripMatrix<double>& w,
                                                     const std::vector<double>& k, Phase phase,
                                                     const RunContext& context) {
  const int64_t n = w.features();
  BasicStripMatrix<double> product(w.rows(), n);
  // Slices of K stay in cache while the strips of a task pass; each result's
  // sum runs over the depth in order.
  constexpr int64_t kStripsPerTask = 8;
  const int64_t tasks = (w.strips() + kStripsPerTask - 1) / kStripsPerTask;
  context.executor->ParallelFor(tasks, [&](int64_t task) {
    const int64_t last = std::min((task + 1) * kStripsPerTask, w.strips());
    for (int64_t j0 = 0; j0 < n; j0 += kPanelRows) {
      if (context.cancelled()) return;
      for (int64_t k0 = 0; k0 < n; k0 += kDepth) {
        for (int64_t s = task * kStripsPerTask; s < last; ++s) {
          MultiplyIntoStrip(std::min(kPanelRows, n - j0), std::min(kDepth, n - k0),
                            k.data() + k0 * n + j0, n, int64_t{1}, w.strip(s) + k0 * kStrip<double>,
                            product.strip(s) + j0 * kStrip<double>);
        }
      }
    }
  });
  if (context.cancelled()) return context.CancellationStatus();
  context.Report(phase, 1);
  return product;
}

std::vector<double> RowDots(const BasicStripMatrix<double>& a, const BasicStripMatrix<double>& b) {
  std::vector<double> dots(static_cast<size_t>(a.strips() * kStrip<double>));
  for (int64_t s = 0; s < a.strips(); ++s) {
    const double* left = a.strip(s);
    const double* right = b.strip(s);
    double* sums = dots.data() + s * kStrip<double>;
    for (int64_t j = 0; j < a.features(); ++j) {
      for (int64_t c = 0; c < kStrip<double>; ++c) {
        sums[c] += left[j * kStrip<double> + c] * right[j * kStrip<double> + c];
      }
    }
  }
  dots.resize(static_cast<size_t>(a.rows()));
  return dots;
}

absl::StatusOr<std::vector<double>> SquaredErrors(const Statistics& statistics,
                                                  const StripMatrix& weights,
                                                  const StripMatrix& change, Phase phase,
                                                  const RunContext& context) {
  if (!statistics.mismatch.has_value()) {
    return QuadraticForms(statistics.gram, change, phase, context);
  }
  return ExactSquaredErrors(statistics, Widen(weights, *context.executor),
                            Widen(change, *context.executor), phase, context);
}

absl::StatusOr<std::vector<double>> ExactSquaredErrors(const Statistics& statistics,
                                                       const BasicStripMatrix<double>& weights,
                                                       const BasicStripMatrix<double>& change,
                                                       Phase phase, const RunContext& context) {
  absl::StatusOr<std::vector<double>> errors =
      QuadraticForms(statistics.gram, change, phase, context);
  if (!errors.ok() || !statistics.mismatch.has_value()) return errors;
  const MismatchSums& mismatch = *statistics.mismatch;
  const auto initial = QuadraticForms(mismatch.residual, weights, phase, context);
  if (!initial.ok()) return initial.status();
  const auto product = TimesSquare(weights, mismatch.cross, phase, context);
  if (!product.ok()) return product.status();
  const std::vector<double> mixed = RowDots(*product, change);
  for (size_t r = 0; r < errors->size(); ++r) (*errors)[r] += 2 * mixed[r] + (*initial)[r];
  ClampAtZero(*errors);
  return errors;
}

absl::StatusOr<std::vector<double>> ReferenceEnergies(const Statistics& statistics,
                                                      const StripMatrix& weights, Phase phase,
                                                      const RunContext& context) {
  // X w = P w + X~ w: the error of changing W to zero.
  return SquaredErrors(statistics, weights, weights, phase, context);
}

}  // namespace certiq::engine
