// Damped factor: lambda by its rule (D1), its retries (D2), and the cache that layers share.

#ifndef CERTIQ_ENGINE_LINALG_DAMPED_FACTOR_H_
#define CERTIQ_ENGINE_LINALG_DAMPED_FACTOR_H_

#include <compare>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/kernels/upper_triangle.h"
#include "engine/linalg/udu_factor.h"
#include "engine/run_context.h"
#include "engine/spec.h"

namespace certiq::engine {

// One try of the factorisation with one lambda.
struct DampingAttempt {
  double lambda = 0;
  StabilityCause cause = StabilityCause::kNone;
  std::string detail;
};

struct DampedFactor {
  double lambda_requested = 0;
  double lambda_used = 0;
  // In order; the last one succeeded where `factor` is there.
  std::vector<DampingAttempt> attempts;
  std::optional<Factor> factor;
};

using SharedFactor = std::shared_ptr<const DampedFactor>;

// What a damped factor depends on, besides the sums.
struct FactorKey {
  Order order = Order::kNatural;
  // Whether the held-out tokens are merged into the sums.
  bool with_held_out = false;
  double lambda = 0;
  FactorUse use = FactorUse::kCertify;
  // The retries (D2).
  int32_t max_attempts = 0;
  double growth = 0;

  auto operator<=>(const FactorKey&) const = default;
};

// Where layers that use the same sums share factors. Thread-safe.
class FactorCache {
 public:
  virtual ~FactorCache() = default;
  // The factor of this key: one kept from before, or what `make` returns. `make` may run here, or,
  // where another layer is making the same factor, not at all. Its errors are not kept.
  virtual absl::StatusOr<SharedFactor> Get(
      const FactorKey& key, const std::function<absl::StatusOr<DampedFactor>()>& make) = 0;
};

// trace(X~^T X~) / N, the unit of relative_trace.
double MeanDiagonal(const UpperTriangle<double>& gram);

// lambda of a rule and its number for these sums (D1). REQUIRES: the rule is
// not kHeldOut. Fails only by cancellation.
absl::StatusOr<double> LambdaOf(DampingRule rule, double value, const UpperTriangle<double>& gram,
                                const RunContext& context);

// Factors gram + lambda I; after a stability failure multiplies lambda by the
// spec's factor and tries again, max_attempts in all (fewer where lambda would leave float64). From
// lambda = 0 the first retry is at eps trace / N, eps = 2^-23, the precision of the sums' products
// (D2). Fails only by cancellation.
absl::StatusOr<DampedFactor> FactorWithDamping(const ResolvedSpec& spec, double lambda,
                                               const UpperTriangle<double>& gram,
                                               const std::vector<bool>& dead, FactorUse use,
                                               const RunContext& context);

// The field of the contract that a rule's number comes from, "spec.damping.absolute".
const char* DampingField(DampingRule rule);

// INVALID_ARGUMENT: numbers of the layer, of `row` first (none: below 0), are not finite with this
// lambda by its rule. Names the damping where that `lambda_alone` did it, else the weights, which
// are too large with activations like these or for the type of the result.
absl::Status TooLarge(const ResolvedSpec& spec, double lambda, bool lambda_alone, int64_t row);

// "lambda 1e-06: pivot -3 at feature 7; lambda ..." for messages.
std::string DescribeAttempts(const std::vector<DampingAttempt>& attempts);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_LINALG_DAMPED_FACTOR_H_
