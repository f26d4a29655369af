// The sweep in float64 along codes that are given: whether each is the right one after those
// before it.

#ifndef CERTIQ_TESTS_ENGINE_REPLAY_H_
#define CERTIQ_TESTS_ENGINE_REPLAY_H_

#include <cstdint>
#include <vector>

#include "engine/gram/gram.h"
#include "engine/linalg/udu_factor.h"
#include "tests/engine/textbook.h"

namespace certiq::testing {

struct Replayed {
  std::vector<double> target;
  std::vector<double> error;
  // How far the engine's float32 target may lie from `target`.
  std::vector<double> slack;
  // Features whose code is not the nearest to the target, and the worst of them: how far its
  // target lay from the tie, in units of the slack. At most 1 where the sweep is right.
  int64_t ties = 0;
  double worst = 0;
};

// (M2) with a float64 factor: v_j, given the codes before j, from the targets' start t. The engine
// adds j products in float32, and rounds U and t to float32: 3 + j roundings of partial sums that
// the sum of magnitudes bounds. Rounding errors that do not conspire stay below 8 sqrt(j + 3) 2^-24
// of that (Higham and Mary 2019, Thm 2.4: except with probability 2 exp(-8^2 / 2) each).
// `start_slack` is what t itself may be off by. Codes before `first` are not judged.
Replayed Replay(const engine::Factor& factor, const std::vector<double>& start, double start_slack,
                const textbook::RowGrid& grid, const std::vector<int>& codes, int64_t first);

// (M4), (M5) in float64 from the sums: v_1 and, given the level q_1 of the first feature, the
// targets of the others, which minimise |X^ w - X^~ q|^2.
struct QronosTargets {
  std::vector<double> targets;
  // The largest residual of their normal equations over its bound, Higham, Thm 10.4:
  // |H z - b| <= 4 n 2^-53 |U| D |U|^T |z|. At most 1 where they were solved well.
  double residual = 0;
  // Two float64 solutions may differ by this much: n 2^-53 times the condition number.
  double slack = 0;
};
QronosTargets StartOfQronos(const engine::Statistics& statistics, const engine::Factor& factor,
                            double lambda, const std::vector<double>& w, double q1);

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_ENGINE_REPLAY_H_
