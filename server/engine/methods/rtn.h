// Rounding without error feedback (RTN), the yardstick every method is
// compared with, and a method of its own.

#ifndef CERTIQ_ENGINE_METHODS_RTN_H_
#define CERTIQ_ENGINE_METHODS_RTN_H_

#include <cstdint>
#include <vector>

#include "engine/kernels/aligned.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/run_context.h"
#include "engine/scales/qparams.h"
#include "engine/spec.h"

namespace certiq::engine {

// Every weight rounded by itself. Vectors but `codes` have one entry a row.
struct NearestRounded {
  // Row-major [rows, features], in working order.
  UnsetVector<uint8_t> codes;
  // W - Q.
  StripMatrix change;
  std::vector<int32_t> clipped;
  double worst_overshoot = 0;
  // With eps_j = max(delta_j / 2, |e_j|): sum_j eps_j |X~_j| and sum_j eps_j^2, for (B2).
  std::vector<double> reach;
  std::vector<double> width;
};

// Rounds by the spec's rounding rule, or takes the codes that are given (row-major, working order;
// null: none are). `feature_norms` are |X~_j|, 0 for dead features, which take
// no part in the sums; `order` as in SweepRules.
NearestRounded RoundAlone(const ResolvedSpec& spec, const std::vector<int64_t>& order,
                          const Grid& grid, const std::vector<double>& feature_norms,
                          const StripMatrix& weights, const UnsetVector<uint8_t>* codes,
                          const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_RTN_H_
