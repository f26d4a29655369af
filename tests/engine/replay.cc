#include "tests/engine/replay.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace certiq::testing {

Replayed Replay(const engine::Factor& factor, const std::vector<double>& start, double start_slack,
                const textbook::RowGrid& grid, const std::vector<int>& codes, int64_t first) {
  const auto n = static_cast<int64_t>(start.size());
  Replayed f;
  f.target = start;
  for (const double t : start) f.slack.push_back(std::abs(t));
  for (int64_t j = 0; j < n; ++j) {
    const auto at = static_cast<size_t>(j);
    const double v = f.target[at];
    f.slack[at] = start_slack + 8 * std::sqrt(static_cast<double>(j) + 3) * 0x1p-24 * f.slack[at];
    const double step = grid.scale[grid.GroupOf(j)];
    if (j >= first && codes[at] != grid.Code(j, v)) {
      const double to_tie = std::abs(v / step - std::floor(v / step) - 0.5) * step;
      f.worst = std::max(f.worst, to_tie / f.slack[at]);
      ++f.ties;
    }
    const double level = static_cast<float>(grid.Level(j, codes[at]));
    f.error.push_back(v - level);
    const double change = start[at] - level;
    const double size = std::abs(change) + 0x1p-24 * std::abs(start[at]);
    const double* u = factor.u.row(j);
    for (int64_t i = j + 1; i < n; ++i) {
      f.target[static_cast<size_t>(i)] += change * u[i - j];
      f.slack[static_cast<size_t>(i)] += size * std::abs(u[i - j]);
    }
  }
  return f;
}

QronosTargets StartOfQronos(const engine::Statistics& statistics, const engine::Factor& f,
                            double lambda, const std::vector<double>& w, double q1) {
  const int64_t n = statistics.features();
  const auto gram = [&](int64_t i, int64_t j) {
    return statistics.gram.at(std::min(i, j), std::max(i, j));
  };
  // y = X~^T P w.
  std::vector<double> y(w.size());
  for (size_t k = 0; k < w.size(); ++k) {
    const double* cross = &statistics.mismatch->cross[k * w.size()];
    for (size_t i = 0; i < w.size(); ++i) y[i] += cross[i] * w[k];
  }
  std::vector<double> right = y;
  for (int64_t i = 1; i < n; ++i) right[static_cast<size_t>(i)] += gram(0, i) * (w[0] - q1);
  // The trailing block of the factor is the factor of the trailing block.
  std::vector<double> z = right;
  for (int64_t i = n - 1; i >= 1; --i) {
    const double* u = f.u.row(i);
    for (int64_t j = i + 1; j < n; ++j) z[static_cast<size_t>(i)] -= u[j - i] * z[j];
  }
  for (size_t i = 1; i < z.size(); ++i) z[i] /= f.d[i];
  for (int64_t i = 1; i < n; ++i) {
    const double* u = f.u.row(i);
    for (int64_t j = i + 1; j < n; ++j) z[static_cast<size_t>(j)] -= u[j - i] * z[i];
  }

  QronosTargets result;
  double weighted = 0;
  double largest = 0;
  for (int64_t i = 1; i < n; ++i) {
    const double magnitude = std::abs(z[static_cast<size_t>(i)]);
    weighted += std::sqrt(gram(i, i) + lambda) * magnitude;
    largest = std::max(largest, magnitude);
  }
  result.slack = 4 * static_cast<double>(n) * 0x1p-53 * f.condition * largest;
  for (int64_t i = 1; i < n; i += std::max<int64_t>(1, n / 64)) {
    const auto at = static_cast<size_t>(i);
    if (gram(i, i) == 0) continue;
    double sum = lambda * z[at] - right[at];
    for (int64_t j = 1; j < n; ++j) sum += gram(i, j) * z[static_cast<size_t>(j)];
    const double bound = 8.0 * static_cast<double>(n + 2) * 0x1p-53 *
                         (std::sqrt(gram(i, i) + lambda) * weighted + std::abs(right[at]));
    if (bound > 0) result.residual = std::max(result.residual, std::abs(sum) / bound);
  }
  for (size_t i = 1; i < z.size(); ++i) z[i] += w[i];
  z[0] = w[0] + (y[0] == 0 ? 0 : y[0] / (gram(0, 0) + lambda));
  result.targets = std::move(z);
  return result;
}

}  // namespace certiq::testing
