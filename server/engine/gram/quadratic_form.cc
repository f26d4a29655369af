#include "engine/gram/quadratic_form.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/status_macros.h"
#include "engine/kernels/packed_panel.h"
#include "engine/kernels/simd.h"

namespace certiq::engine {
namespace {

// Where a form's S comes from: rows of its upper triangle.
class FormSource {
 public:
  virtual ~FormSource() = default;
  virtual double Diagonal(int64_t i) const = 0;
  // Elements [k0, k0 + columns) of rows [0, rows) of panel p, counted from the panel's first
  // column, to row i of `to`, kSlice apart.
  virtual void Rows(int64_t p, int64_t k0, int64_t columns, double* to) const = 0;
};

constexpr int64_t kSlice = PackedPanel<double>::kSlice;

// One triangle as it is stored.
class Triangle final : public FormSource {
 public:
  explicit Triangle(const UpperTriangle<double>& s) : s_(s) {}
  double Diagonal(int64_t i) const override { return s_.at(i, i); }
  void Rows(int64_t p, int64_t k0, int64_t columns, double* to) const override {
    for (int64_t i = 0; i < s_.rows(p); ++i) {
      std::copy_n(s_.panel(p) + i * s_.stride(p) + k0, columns, to + i * kSlice);
    }
  }

 private:
  const UpperTriangle<double>& s_;
};

// X^T X = P^T P + P^T X~ + X~^T P + X~^T X~.
class FloatInputs final : public FormSource {
 public:
  explicit FloatInputs(const Statistics& statistics) : sums_(statistics) {}
  double Diagonal(int64_t i) const override {
    return sums_.gram.at(i, i) + sums_.mismatch->residual.at(i, i) + 2 * Cross(i)[i];
  }
  void Rows(int64_t p, int64_t k0, int64_t columns, double* to) const override {
    const UpperTriangle<double>& gram = sums_.gram;
    const int64_t stride = gram.stride(p);
    const int64_t first = gram.begin(p) + k0;
    for (int64_t i = 0; i < gram.rows(p); ++i) {
      const double* a = gram.panel(p) + i * stride + k0;
      const double* b = sums_.mismatch->residual.panel(p) + i * stride + k0;
      const double* c = Cross(gram.begin(p) + i) + first;
      for (int64_t k = 0; k < columns; ++k) to[i * kSlice + k] = a[k] + b[k] + c[k];
    }
    for (int64_t k = 0; k < columns; ++k) {
      const double* d = Cross(first + k) + gram.begin(p);
      for (int64_t i = 0; i < gram.rows(p); ++i) to[i * kSlice + k] += d[i];
    }
  }

 private:
  const double* Cross(int64_t i) const {
    return sums_.mismatch->cross.data() + i * sums_.features();
  }
  const Statistics& sums_;
};

// The exponent that brings the largest diagonal entry, and with it by Cauchy-
// Schwarz every entry, to at most one. 0 where there is none: sums that are not finite have forms
// that are not.
int Exponent(const FormSource& s, int64_t size) {
  double largest = 0;
  for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::abs(s.Diagonal(i)));
  return largest > 0 && std::isfinite(largest) ? std::ilogb(largest) + 1 : 0;
}

// A slice of panel p of S as PackedPanel wants it. The diagonal once, what is right of it twice,
// what is below it and beyond the last row zero, so that the full form is sum over panels of
// x_p^T (panel) x.
template <typename T>
void ConvertSlice(const FormSource& s, int64_t p, int64_t rows, int64_t k0, int64_t columns,
                  int exponent, T* to) {
  const double once = std::ldexp(1.0, -exponent);
  alignas(kVectorBytes) double values[kPanelRows * kSlice];
  s.Rows(p, k0, columns, values);
  for (int64_t i = 0; i < kPanelRows; ++i) {
    T* out = to + i / kMicroRows * columns * kMicroRows + i % kMicroRows;
    const double* from = values + i * kSlice;
    for (int64_t k = 0; k < columns; ++k) {
      const double times = k0 + k > i ? 2 * once : once;
      out[k * kMicroRows] = i >= rows || k0 + k < i ? T{0} : static_cast<T>(times * from[k]);
    }
  }
}

void ClampAtZero(std::vector<double>& forms) {
  // Rounding may leave a form of a semidefinite S a little below zero.
  for (double& form : forms) form = std::max(0.0, form);
}

// x^T S x for every row; `s` has the shape of S.
template <typename T>
absl::StatusOr<std::vector<double>> Forms(const FormSource& source, const UpperTriangle<double>& s,
                                          const BasicStripMatrix<T>& rows, Phase phase,
                                          const RunContext& context) {
  constexpr int64_t kWidth = kStrip<T>;
  std::vector<double> forms(static_cast<size_t>(rows.strips() * kWidth), 0.0);
  PackedPanel<T> panel(s.size());
  const int exponent = Exponent(source, s.size());
  for (int64_t p = 0; p < s.panels(); ++p) {
    if (context.cancelled()) return context.CancellationStatus();
    panel.Pack(s.stride(p), *context.executor, [&](int64_t k0, int64_t columns, T* to) {
      ConvertSlice(source, p, s.rows(p), k0, columns, exponent, to);
    });
    ForTiles(rows.strips(), *context.executor, [&](int64_t first, int64_t last) {
      AlignedVector<T> products(static_cast<size_t>((last - first) * kPanelRows * kWidth));
      const T* x = rows.strip(first) + s.begin(p) * kWidth;
      panel.AddProducts(/*upper=*/true, last - first, x, rows.features() * kWidth, products.data(),
                        kPanelRows * kWidth);
      for (int64_t strip = first; strip < last; ++strip) {
        const T* left = rows.strip(strip) + s.begin(p) * kWidth;
        const T* product = products.data() + (strip - first) * kPanelRows * kWidth;
        double* sums = forms.data() + strip * kWidth;
        for (int64_t i = 0; i < s.rows(p); ++i) {
          for (int64_t c = 0; c < kWidth; ++c) {
            sums[c] += static_cast<double>(left[i * kWidth + c]) *
                       static_cast<double>(product[i * kWidth + c]);
          }
        }
      }
    });
    context.Report(phase, static_cast<double>(p + 1) / static_cast<double>(s.panels()));
  }
  forms.resize(static_cast<size_t>(rows.rows()));
  for (double& form : forms) form = std::ldexp(form, exponent);
  return forms;
}

}  // namespace

template <typename T>
absl::StatusOr<std::vector<double>> QuadraticForms(const UpperTriangle<double>& s,
                                                   const BasicStripMatrix<T>& rows, Phase phase,
                                                   const RunContext& context) {
  ASSIGN_OR_RETURN(std::vector<double> forms, Forms(Triangle(s), s, rows, phase, context));
  ClampAtZero(forms);
  return forms;
}

template absl::StatusOr<std::vector<double>> QuadraticForms(const UpperTriangle<double>& s,
                                                            const BasicStripMatrix<float>& rows,
                                                            Phase phase, const RunContext& context);
template absl::StatusOr<std::vector<double>> QuadraticForms(const UpperTriangle<double>& s,
                                                            const BasicStripMatrix<double>& rows,
                                                            Phase phase, const RunContext& context);

absl::StatusOr<BasicStripMatrix<double>> TimesSquare(const BasicStripMatrix<double>& w,
                                                     const std::vector<double>& k, Phase phase,
                                                     const RunContext& context) {
  const int64_t n = w.features();
  auto product = BasicStripMatrix<double>::Unset(w.rows(), n);
  // A block of columns of K at a time.
  PackedPanel<double> block(n);
  for (int64_t j0 = 0; j0 < n; j0 += kPanelRows) {
    if (context.cancelled()) return context.CancellationStatus();
    const int64_t live = std::min(kPanelRows, n - j0);
    block.Pack(n, *context.executor, [&](int64_t k0, int64_t columns, double* to) {
      for (int64_t column = 0; column < columns; ++column) {
        const double* from = k.data() + (k0 + column) * n + j0;
        for (int64_t j = 0; j < kPanelRows; ++j) {
          to[(j / kMicroRows * columns + column) * kMicroRows + j % kMicroRows] =
              j < live ? from[j] : 0;
        }
      }
    });
    ForTiles(w.strips(), *context.executor, [&](int64_t first, int64_t last) {
      AlignedVector<double> products(
          static_cast<size_t>((last - first) * kPanelRows * kStrip<double>));
      block.AddProducts(/*upper=*/false, last - first, w.strip(first), n * kStrip<double>,
                        products.data(), kPanelRows * kStrip<double>);
      for (int64_t s = first; s < last; ++s) {
        std::copy_n(products.data() + (s - first) * kPanelRows * kStrip<double>,
                    live * kStrip<double>, product.strip(s) + j0 * kStrip<double>);
      }
    });
  }
  if (context.cancelled()) return context.CancellationStatus();
  context.Report(phase, 1);
  return product;
}

std::vector<double> RowDots(const BasicStripMatrix<double>& a, const BasicStripMatrix<double>& b,
                            Executor& executor) {
  std::vector<double> dots(static_cast<size_t>(a.strips() * kStrip<double>));
  executor.ParallelFor(a.strips(), [&](int64_t s) {
    const double* left = a.strip(s);
    const double* right = b.strip(s);
    double* sums = dots.data() + s * kStrip<double>;
    for (int64_t j = 0; j < a.features(); ++j) {
      for (int64_t c = 0; c < kStrip<double>; ++c) {
        sums[c] += left[j * kStrip<double> + c] * right[j * kStrip<double> + c];
      }
    }
  });
  dots.resize(static_cast<size_t>(a.rows()));
  return dots;
}

std::vector<double> RowNorms(const StripMatrix& rows, Executor& executor) {
  const int64_t width = StripMatrix::StripRows();
  std::vector<double> norms(static_cast<size_t>(rows.strips() * width));
  executor.ParallelFor(rows.strips(), [&](int64_t s) {
    const float* strip = rows.strip(s);
    double* sums = norms.data() + s * width;
    for (int64_t j = 0; j < rows.features(); ++j) {
      for (int64_t c = 0; c < width; ++c) {
        const double value = strip[j * width + c];
        sums[c] += value * value;
      }
    }
  });
  norms.resize(static_cast<size_t>(rows.rows()));
  return norms;
}

double Sum(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return sum;
}

std::vector<double> Roots(const std::vector<double>& squares) {
  std::vector<double> roots = squares;
  for (double& root : roots) root = std::sqrt(root);
  return roots;
}

double RelativeError(double squared_error, double energy) {
  if (squared_error == 0) return 0;
  return std::sqrt(squared_error / energy);
}

absl::StatusOr<InitialError> ComputeInitialError(const Statistics& statistics,
                                                 const BasicStripMatrix<double>& weights,
                                                 Phase phase, const RunContext& context) {
  const MismatchSums& mismatch = *statistics.mismatch;
  InitialError error;
  ASSIGN_OR_RETURN(error.squares, QuadraticForms(mismatch.residual, weights, phase, context));
  ASSIGN_OR_RETURN(error.cross, TimesSquare(weights, mismatch.cross, phase, context));
  return error;
}

namespace {

// |P w + X~ d|^2 from |X~ d|^2.
absl::StatusOr<std::vector<double>> AddInitial(std::vector<double> errors,
                                               const Statistics& statistics,
                                               const BasicStripMatrix<double>& weights,
                                               const BasicStripMatrix<double>& change,
                                               const InitialError* initial, Phase phase,
                                               const RunContext& context) {
  InitialError made;
  if (initial == nullptr) {
    ASSIGN_OR_RETURN(made, ComputeInitialError(statistics, weights, phase, context));
    initial = &made;
  }
  const std::vector<double> mixed = RowDots(initial->cross, change, *context.executor);
  for (size_t r = 0; r < errors.size(); ++r) errors[r] += 2 * mixed[r] + initial->squares[r];
  return errors;
}

}  // namespace

absl::StatusOr<std::vector<double>> SquaredErrors(const Statistics& statistics,
                                                  const StripMatrix& weights,
                                                  const StripMatrix& change,
                                                  const InitialError* initial, Phase phase,
                                                  const RunContext& context) {
  if (!statistics.mismatch.has_value()) {
    return Forms(Triangle(statistics.gram), statistics.gram, change, phase, context);
  }
  const BasicStripMatrix<double> wide =
      initial == nullptr ? Widen(weights, *context.executor) : BasicStripMatrix<double>();
  return ExactSquaredErrors(statistics, wide, Widen(change, *context.executor), initial, phase,
                            context);
}

absl::StatusOr<std::vector<double>> ReferenceEnergies(const Statistics& statistics,
                                                      const StripMatrix& weights, Phase phase,
                                                      const RunContext& context) {
  if (!statistics.mismatch.has_value()) {
    return Forms(Triangle(statistics.gram), statistics.gram, weights, phase, context);
  }
  return Forms(FloatInputs(statistics), statistics.gram, weights, phase, context);
}

absl::StatusOr<std::vector<double>> ExactSquaredErrors(const Statistics& statistics,
                                                       const BasicStripMatrix<double>& weights,
                                                       const BasicStripMatrix<double>& change,
                                                       const InitialError* initial, Phase phase,
                                                       const RunContext& context) {
  ASSIGN_OR_RETURN(std::vector<double> forms,
                   Forms(Triangle(statistics.gram), statistics.gram, change, phase, context));
  if (!statistics.mismatch.has_value()) return forms;
  return AddInitial(std::move(forms), statistics, weights, change, initial, phase, context);
}

}  // namespace certiq::engine
