#include "tests/engine/textbook.h"

#include <algorithm>
#include <cmath>

namespace certiq::textbook {

Matrix Gram(const Matrix& x) {
  Matrix h(x.cols, x.cols);
  for (int64_t i = 0; i < x.cols; ++i) {
    for (int64_t j = 0; j < x.cols; ++j) {
      for (int64_t t = 0; t < x.rows; ++t) h(i, j) += x(t, i) * x(t, j);
    }
  }
  return h;
}

double SquaredNorm(const Matrix& a) {
  double sum = 0;
  for (const double v : a.values) sum += v * v;
  return sum;
}

double SquaredImage(const Matrix& x, const std::vector<double>& a) {
  double sum = 0;
  for (int64_t t = 0; t < x.rows; ++t) {
    double dot = 0;
    for (int64_t j = 0; j < x.cols; ++j) dot += x(t, j) * a[static_cast<size_t>(j)];
    sum += dot * dot;
  }
  return sum;
}

bool ReverseFactor(const Matrix& h, Matrix& u, std::vector<double>& d) {
  const int64_t n = h.rows;
  u = Matrix(n, n);
  d.assign(static_cast<size_t>(n), 0.0);
  for (int64_t j = n - 1; j >= 0; --j) {
    for (int64_t i = j; i >= 0; --i) {
      double sum = h(i, j);
      for (int64_t l = j + 1; l < n; ++l) sum -= u(i, l) * d[static_cast<size_t>(l)] * u(j, l);
      if (i == j) {
        if (!(sum > 0)) return false;
        d[static_cast<size_t>(j)] = sum;
        u(j, j) = 1;
      } else {
        u(i, j) = sum / d[static_cast<size_t>(j)];
      }
    }
  }
  return true;
}

int RowGrid::Code(int64_t j, double value) const {
  const double code = std::nearbyint(value / scale[GroupOf(j)]) + zero[GroupOf(j)];
  return static_cast<int>(
      std::clamp(code, static_cast<double>(lowest), static_cast<double>(highest)));
}

RowGrid AbsmaxGrid(const std::vector<double>& w, int bits, bool symmetric, int64_t group_size) {
  RowGrid grid;
  grid.group_size = group_size;
  grid.highest = (1 << bits) - 1;
  const auto features = static_cast<int64_t>(w.size());
  const int64_t step = group_size == 0 ? features : group_size;
  for (int64_t begin = 0; begin < features; begin += step) {
    double low = 0;
    double high = 0;
    for (int64_t j = begin; j < std::min(begin + step, features); ++j) {
      low = std::min(low, w[static_cast<size_t>(j)]);
      high = std::max(high, w[static_cast<size_t>(j)]);
    }
    const double span = symmetric ? 2 * std::max(-low, high) : high - low;
    const double scale = span == 0 ? 1.0 : static_cast<float>(span / grid.highest);
    grid.scale.push_back(scale);
    grid.zero.push_back(symmetric ? 1 << (bits - 1)
                                  : std::min<double>(std::nearbyint(-low / scale), grid.highest));
  }
  return grid;
}

RoundedRow Optq(const std::vector<double>& w, const Matrix& u, const RowGrid& grid) {
  RoundedRow row;
  const auto n = static_cast<int64_t>(w.size());
  for (int64_t j = 0; j < n; ++j) {
    double v = w[static_cast<size_t>(j)];
    for (int64_t k = 0; k < j; ++k) {
      v += (w[static_cast<size_t>(k)] - row.level[static_cast<size_t>(k)]) * u(k, j);
    }
    const int code = grid.Code(j, v);
    row.codes.push_back(code);
    row.target.push_back(v);
    row.level.push_back(grid.Level(j, code));
    row.error.push_back(v - row.level.back());
  }
  return row;
}

}  // namespace certiq::textbook
