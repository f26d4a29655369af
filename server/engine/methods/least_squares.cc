#include "engine/methods/least_squares.h"

#include <algorithm>
#include <utility>

#include "base/status_macros.h"
#include "engine/kernels/aligned.h"
#include "engine/kernels/packed_panel.h"
#include "engine/kernels/simd.h"
#include "engine/linalg/feedback_kernel.h"

namespace certiq::engine {
namespace {

constexpr int64_t kWidth = kStrip<double>;
constexpr int64_t kFloatWidth = kStrip<float>;
// Where less than this share of |P w|^2 is left as floor, float32 terms of it would be off by more
// than about 1e-4 of the floor.
constexpr double kCancellation = 0.05;
// Rows of a task of AddLeastSquares: they share each slice of U.
constexpr int64_t kCorrectedRows = 128;

// Strips of one block of features, [strips][kPanelRows][kStrip].
template <typename T>
AlignedVector<T> BlockProducts(const PackedPanel<T>& block, const T* x, int64_t features,
                               int64_t strips) {
  AlignedVector<T> products(static_cast<size_t>(strips * kPanelRows * kStrip<T>));
  block.AddProducts(/*upper=*/false, strips, x, features * kStrip<T>, products.data(),
                    kPanelRows * kStrip<T>);
  return products;
}

// The diagonal block of SolveUpper for one strip x [rows][kWidth], in place: a micro-group of rows
// gets the part of those after it at once, and then of its own, last to first.
void SolveDiagonal(const double* diagonal, int64_t rows, double* x) {
  for (int64_t first = (rows - 1) / kMicroRows * kMicroRows; first >= 0; first -= kMicroRows) {
    const int64_t end = std::min(rows, first + kMicroRows);
    const double* block = diagonal + first * kPanelRows;
    MultiplyIntoStrip(end - first, rows - end, block + end, int64_t{1}, kPanelRows,
                      x + end * kWidth, x + first * kWidth);
    for (int64_t j = end - 1; j > first; --j) {
      for (int64_t i = first; i < j; ++i) {
        const double scalar = diagonal[i * kPanelRows + j];
        for (int64_t c = 0; c < kWidth; ++c) x[i * kWidth + c] += scalar * x[j * kWidth + c];
      }
    }
  }
}

// U a = y in place for every row, last feature first. Fails only by cancellation.
absl::Status SolveUpper(const UpperTriangle<double>& u, BasicStripMatrix<double>& x,
                        const RunContext& context) {
  PackedPanel<double> block(u.size());
  for (int64_t p = u.panels() - 1; p >= 0; --p) {
    if (context.cancelled()) return context.CancellationStatus();
    const int64_t after = u.end(p);
    block.Pack(u.size() - after, *context.executor, [&](int64_t k0, int64_t columns, double* to) {
      for (int64_t i = 0; i < kPanelRows; ++i) {
        double* out = to + i / kMicroRows * columns * kMicroRows + i % kMicroRows;
        const double* from =
            i < u.rows(p) ? u.panel(p) + i * u.stride(p) + u.rows(p) + k0 : nullptr;
        for (int64_t k = 0; k < columns; ++k) {
          out[k * kMicroRows] = from == nullptr ? 0 : from[k];
        }
      }
    });
    // The diagonal block, negative, zeros on and below its diagonal and beyond its last row.
    AlignedVector<double> diagonal(static_cast<size_t>(kPanelRows * kPanelRows));
    for (int64_t i = 0; i < u.rows(p); ++i) {
      for (int64_t j = i + 1; j < u.rows(p); ++j) {
        diagonal[static_cast<size_t>(i * kPanelRows + j)] = -u.row(u.begin(p) + i)[j - i];
      }
    }
    ForTiles(x.strips(), *context.executor, [&](int64_t first, int64_t last) {
      const AlignedVector<double> products =
          BlockProducts(block, x.strip(first) + after * kWidth, u.size(), last - first);
      for (int64_t s = first; s < last; ++s) {
        double* strip = x.strip(s);
        const double* product = products.data() + (s - first) * kPanelRows * kWidth;
        double* x_p = strip + u.begin(p) * kWidth;
        for (int64_t i = 0; i < u.rows(p) * kWidth; ++i) x_p[i] -= product[i];
        SolveDiagonal(diagonal.data(), u.rows(p), x_p);
      }
    });
  }
  return absl::OkStatus();
}

// A^T for A = U^-1 X~^T P: row i is U^-1 times column i of X~^T P.
absl::StatusOr<BasicStripMatrix<double>> SolveCross(const Statistics& statistics,
                                                    const Factor& factor,
                                                    const RunContext& context) {
  const int64_t n = statistics.features();
  const std::vector<double>& cross = statistics.mismatch->cross;
  auto solved = BasicStripMatrix<double>::Unset(n, n);
  context.executor->ParallelFor(solved.strips(), [&](int64_t s) {
    double* strip = solved.strip(s);
    const int64_t first = s * kWidth;
    const int64_t live = std::min(kWidth, n - first);
    if (live < kWidth) std::fill_n(strip, n * kWidth, 0.0);
    for (int64_t j0 = 0; j0 < n; j0 += kPanelRows) {
      const int64_t j1 = std::min(n, j0 + kPanelRows);
      for (int64_t c = 0; c < live; ++c) {
        const double* from = cross.data() + (first + c) * n;
        for (int64_t j = j0; j < j1; ++j) strip[j * kWidth + c] = from[j];
      }
    }
  });
  UpperTriangle<double> room;
  const UpperTriangle<double>& u = WideU(factor, room, *context.executor);
  RETURN_IF_ERROR(SolveUpper(u, solved, context));
  return solved;
}

// o = D^-1 A w for every row of W.
absl::StatusOr<StripMatrix> Offsets(const BasicStripMatrix<double>& solved,
                                    const std::vector<double>& d, const StripMatrix& weights,
                                    const RunContext& context) {
  const int64_t n = weights.features();
  StripMatrix offsets = StripMatrix::Unset(weights.rows(), n);
  PackedPanel<float> block(n);
  for (int64_t j0 = 0; j0 < n; j0 += kPanelRows) {
    if (context.cancelled()) return context.CancellationStatus();
    const int64_t live = std::min(kPanelRows, n - j0);
    block.Pack(n, *context.executor, [&](int64_t k0, int64_t columns, float* to) {
      for (int64_t j = 0; j < kPanelRows; ++j) {
        float* out = to + j / kMicroRows * columns * kMicroRows + j % kMicroRows;
        const double scale = j < live ? 1 / d[static_cast<size_t>(j0 + j)] : 0;
        for (int64_t k = 0; k < columns; ++k) {
          const int64_t i = k0 + k;
          out[k * kMicroRows] =
              j < live ? static_cast<float>(
                             scale * solved.strip(i / kWidth)[(j0 + j) * kWidth + i % kWidth])
                       : 0.0f;
        }
      }
    });
    ForTiles(weights.strips(), *context.executor, [&](int64_t first, int64_t last) {
      const AlignedVector<float> products =
          BlockProducts(block, weights.strip(first), n, last - first);
      for (int64_t s = first; s < last; ++s) {
        std::copy_n(products.data() + (s - first) * kPanelRows * kFloatWidth, live * kFloatWidth,
                    offsets.strip(s) + j0 * kFloatWidth);
      }
    });
  }
  return offsets;
}

// sum_j D_j o_j^2 of every row.
std::vector<double> Removed(const std::vector<double>& d, const StripMatrix& offsets,
                            Executor& executor) {
  std::vector<double> removed(static_cast<size_t>(offsets.strips() * kFloatWidth));
  executor.ParallelFor(offsets.strips(), [&](int64_t s) {
    const float* strip = offsets.strip(s);
    double* sums = removed.data() + s * kFloatWidth;
    for (int64_t j = 0; j < offsets.features(); ++j) {
      for (int64_t c = 0; c < kFloatWidth; ++c) {
        const double value = strip[j * kFloatWidth + c];
        sums[c] += d[static_cast<size_t>(j)] * value * value;
      }
    }
  });
  removed.resize(static_cast<size_t>(offsets.rows()));
  return removed;
}

// w . x for every row of W.
std::vector<double> Dots(const StripMatrix& weights, const std::vector<double>& x,
                         Executor& executor) {
  std::vector<double> dots(static_cast<size_t>(weights.strips() * kFloatWidth));
  executor.ParallelFor(weights.strips(), [&](int64_t s) {
    const float* strip = weights.strip(s);
    double* sums = dots.data() + s * kFloatWidth;
    for (int64_t j = 0; j < weights.features(); ++j) {
      for (int64_t c = 0; c < kFloatWidth; ++c) {
        sums[c] += static_cast<double>(strip[j * kFloatWidth + c]) * x[static_cast<size_t>(j)];
      }
    }
  });
  dots.resize(static_cast<size_t>(weights.rows()));
  return dots;
}

}  // namespace

absl::StatusOr<LeastSquares> SolveRowByRow(InitialError initial, const Factor& factor,
                                           const RunContext& context) {
  BasicStripMatrix<double>& y = initial.cross;
  const int64_t rows = y.rows();
  const int64_t n = y.features();
  const std::vector<double>& d = factor.d;
  LeastSquares result;
  result.unchanged = std::move(initial.squares);
  result.floor = result.unchanged;
  for (int64_t r = 0; r < rows; ++r) {
    result.first_product.push_back(y.strip(r / kWidth)[r % kWidth]);
  }
  UpperTriangle<double> room;
  const UpperTriangle<double>& u = WideU(factor, room, *context.executor);
  RETURN_IF_ERROR(SolveUpper(u, y, context));
  result.first_solved.resize(static_cast<size_t>(rows));
  result.offsets = StripMatrix(rows, n);
  context.executor->ParallelFor(y.strips(), [&](int64_t s) {
    const double* a = y.strip(s);
    const int64_t first = s * kWidth;
    const int64_t live = std::min(kWidth, rows - first);
    // A double strip is half a float strip.
    float* to = result.offsets.strip(first / kFloatWidth) + first % kFloatWidth;
    double removed[kWidth] = {};
    for (int64_t j = 0; j < n; ++j) {
      const double d_j = d[static_cast<size_t>(j)];
      for (int64_t c = 0; c < kWidth; ++c) {
        const double offset = a[j * kWidth + c] / d_j;
        removed[c] += offset * a[j * kWidth + c];
        if (c < live) to[j * kFloatWidth + c] = static_cast<float>(offset);
      }
    }
    for (int64_t c = 0; c < live; ++c) {
      const auto r = static_cast<size_t>(first + c);
      result.first_solved[r] = a[c];
      result.floor[r] = std::max(0.0, result.floor[r] - removed[c]);
    }
  });
  if (context.cancelled()) return context.CancellationStatus();
  return result;
}

absl::StatusOr<LeastSquares> SolveTogether(const Statistics& statistics, const StripMatrix& weights,
                                           const Factor& factor, const RunContext& context) {
  const int64_t n = weights.features();
  LeastSquares result;
  ASSIGN_OR_RETURN(result.unchanged,
                   QuadraticForms(statistics.mismatch->residual, weights, Phase::kRound, context));
  {
    ASSIGN_OR_RETURN(const auto solved, SolveCross(statistics, factor, context));
    ASSIGN_OR_RETURN(result.offsets, Offsets(solved, factor.d, weights, context));
    std::vector<double> first_row(static_cast<size_t>(n));
    std::vector<double> first_cross(first_row.size());
    for (int64_t i = 0; i < n; ++i) {
      first_row[static_cast<size_t>(i)] = solved.strip(i / kWidth)[i % kWidth];
      first_cross[static_cast<size_t>(i)] = statistics.mismatch->cross[static_cast<size_t>(i * n)];
    }
    result.first_solved = Dots(weights, first_row, *context.executor);
    result.first_product = Dots(weights, first_cross, *context.executor);
  }
  result.floor = Removed(factor.d, result.offsets, *context.executor);
  std::vector<int64_t> inexact;
  for (size_t r = 0; r < result.floor.size(); ++r) {
    result.floor[r] = std::max(0.0, result.unchanged[r] - result.floor[r]);
    if (!(result.floor[r] > kCancellation * result.unchanged[r]) && result.unchanged[r] != 0) {
      inexact.push_back(static_cast<int64_t>(r));
    }
  }
  if (inexact.empty()) return result;

  ASSIGN_OR_RETURN(
      auto initial,
      ComputeInitialError(statistics, Widen(SelectRows(weights, inexact), *context.executor),
                          Phase::kRound, context));
  ASSIGN_OR_RETURN(const auto exact, SolveRowByRow(std::move(initial), factor, context));
  std::vector<float> row(static_cast<size_t>(n));
  for (size_t i = 0; i < inexact.size(); ++i) {
    const auto r = static_cast<size_t>(inexact[i]);
    exact.offsets.GetRow(static_cast<int64_t>(i), row.data());
    result.offsets.SetRow(inexact[i], row.data());
    result.first_product[r] = exact.first_product[i];
    result.first_solved[r] = exact.first_solved[i];
    result.unchanged[r] = exact.unchanged[i];
    result.floor[r] = exact.floor[i];
  }
  return result;
}

absl::Status AddLeastSquares(const FeedbackColumns& u, const StripMatrix& offsets,
                             StripMatrix& weights, const RunContext& context) {
  constexpr int64_t kTileStrips = kCorrectedRows / kFloatWidth;
  const int64_t values = weights.features() * kFloatWidth;
  const int64_t tiles = (weights.strips() + kTileStrips - 1) / kTileStrips;
  context.executor->ParallelFor(tiles, [&](int64_t tile) {
    const int64_t first = tile * kTileStrips;
    const int64_t strips = std::min(kTileStrips, weights.strips() - first);
    AlignedVector<float> z(static_cast<size_t>(strips * values));
    std::copy_n(offsets.strip(first), strips * values, z.data());
    std::vector<RowsOverU> solves;
    for (int64_t s = 0; s < strips; ++s) solves.emplace_back(u, z.data() + s * values, 0);
    if (!SolveTile(u, solves, context)) return;
    float* to = weights.strip(first);
    for (int64_t i = 0; i < strips * values; ++i) to[i] += z[static_cast<size_t>(i)];
  });
  return context.cancelled() ? context.CancellationStatus() : absl::OkStatus();
}

}  // namespace certiq::engine
