#include "tests/engine/textbook.h"

#include <algorithm>
#include <cmath>
#include <utility>

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

Matrix Inverse(const Matrix& h) {
  const int64_t n = h.rows;
  Matrix a = h;
  Matrix inverse(n, n);
  for (int64_t i = 0; i < n; ++i) inverse(i, i) = 1;
  for (int64_t c = 0; c < n; ++c) {
    int64_t pivot = c;
    for (int64_t r = c + 1; r < n; ++r) {
      if (std::abs(a(r, c)) > std::abs(a(pivot, c))) pivot = r;
    }
    for (int64_t j = 0; j < n; ++j) {
      std::swap(a(c, j), a(pivot, j));
      std::swap(inverse(c, j), inverse(pivot, j));
    }
    const double scale = a(c, c);
    for (int64_t j = 0; j < n; ++j) {
      a(c, j) /= scale;
      inverse(c, j) /= scale;
    }
    for (int64_t r = 0; r < n; ++r) {
      if (r == c) continue;
      const double factor = a(r, c);
      for (int64_t j = 0; j < n; ++j) {
        a(r, j) -= factor * a(c, j);
        inverse(r, j) -= factor * inverse(c, j);
      }
    }
  }
  return inverse;
}

Matrix CrossGram(const Matrix& a, const Matrix& b) {
  Matrix g(a.cols, b.cols);
  for (int64_t i = 0; i < a.cols; ++i) {
    for (int64_t j = 0; j < b.cols; ++j) {
      for (int64_t t = 0; t < a.rows; ++t) g(i, j) += a(t, i) * b(t, j);
    }
  }
  return g;
}

double Form(const std::vector<double>& a, const Matrix& m, const std::vector<double>& b) {
  double sum = 0;
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.cols; ++j) {
      sum += a[static_cast<size_t>(i)] * m(i, j) * b[static_cast<size_t>(j)];
    }
  }
  return sum;
}

RoundedRow DynamicOptq(const std::vector<double>& w, const Matrix& h, int bits, bool symmetric,
                       int64_t group_size, RowGrid& grid) {
  const auto n = static_cast<int64_t>(w.size());
  std::vector<double> updated = w;
  RoundedRow row;
  grid = RowGrid();
  grid.group_size = group_size;
  grid.highest = (1 << bits) - 1;
  for (int64_t k = 0; k < n; ++k) {
    if (k % group_size == 0) {
      const auto end = std::min(k + group_size, n);
      const RowGrid step =
          AbsmaxGrid({updated.begin() + k, updated.begin() + end}, bits, symmetric, 0);
      grid.scale.push_back(step.scale[0]);
      grid.zero.push_back(step.zero[0]);
    }
    const auto at = static_cast<size_t>(k);
    row.target.push_back(updated[at]);
    row.codes.push_back(grid.Code(k, updated[at]));
    row.level.push_back(grid.Level(k, row.codes.back()));
    row.error.push_back(updated[at] - row.level.back());
    // The inverse of the trailing block gives the update of the columns after k.
    Matrix tail(n - k, n - k);
    for (int64_t i = k; i < n; ++i) {
      for (int64_t j = k; j < n; ++j) tail(i - k, j - k) = h(i, j);
    }
    const Matrix inverse = Inverse(tail);
    for (int64_t j = k + 1; j < n; ++j) {
      updated[static_cast<size_t>(j)] -= row.error.back() * inverse(0, j - k) / inverse(0, 0);
    }
  }
  return row;
}

RoundedRow Qronos(const std::vector<double>& w, const Matrix& h, const Matrix& g,
                  const RowGrid& grid) {
  const auto n = static_cast<int64_t>(w.size());
  RoundedRow row;
  for (int64_t k = 0; k < n; ++k) {
    double v = 0;
    if (k == 0) {
      // (M4): the other weights are held where they are.
      for (int64_t j = 0; j < n; ++j) v += g(0, j) * w[static_cast<size_t>(j)];
      for (int64_t j = 1; j < n; ++j) v -= h(0, j) * w[static_cast<size_t>(j)];
      v /= h(0, 0);
    } else {
      // Normal equations of the free columns k..n-1.
      Matrix tail(n - k, n - k);
      std::vector<double> right(static_cast<size_t>(n - k));
      for (int64_t i = k; i < n; ++i) {
        for (int64_t j = k; j < n; ++j) tail(i - k, j - k) = h(i, j);
        double sum = 0;
        for (int64_t j = 0; j < n; ++j) sum += g(i, j) * w[static_cast<size_t>(j)];
        for (int64_t j = 0; j < k; ++j) sum -= h(i, j) * row.level[static_cast<size_t>(j)];
        right[static_cast<size_t>(i - k)] = sum;
      }
      const Matrix inverse = Inverse(tail);
      for (int64_t j = 0; j < n - k; ++j) v += inverse(0, j) * right[static_cast<size_t>(j)];
    }
    row.target.push_back(v);
    row.codes.push_back(grid.Code(k, v));
    row.level.push_back(grid.Level(k, row.codes.back()));
    row.error.push_back(v - row.level.back());
  }
  return row;
}

double Floor(const std::vector<double>& w, const Matrix& h, const Matrix& g, const Matrix& c) {
  const auto n = static_cast<int64_t>(w.size());
  std::vector<double> gw(w.size());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j)
      gw[static_cast<size_t>(i)] += g(i, j) * w[static_cast<size_t>(j)];
  }
  return Form(w, c, w) - Form(gw, Inverse(h), gw);
}

}  // namespace certiq::textbook
