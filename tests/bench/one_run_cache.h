// Factors that the layers of one run share.

#ifndef CERTIQ_TESTS_BENCH_ONE_RUN_CACHE_H_
#define CERTIQ_TESTS_BENCH_ONE_RUN_CACHE_H_

#include <functional>
#include <map>
#include <memory>
#include <utility>

#include "absl/status/statusor.h"
#include "engine/linalg/damped_factor.h"

namespace certiq::bench {

// A cache of one run: three layers of a calibration come one after another.
class OneRunCache final : public engine::FactorCache {
 public:
  absl::StatusOr<engine::SharedFactor> Get(
      const engine::FactorKey& key,
      const std::function<absl::StatusOr<engine::DampedFactor>()>& make) override {
    engine::SharedFactor& factor = factors_[key];
    if (factor != nullptr) return factor;
    absl::StatusOr<engine::DampedFactor> made = make();
    if (!made.ok()) return made.status();
    factor = std::make_shared<const engine::DampedFactor>(*std::move(made));
    return factor;
  }

 private:
  std::map<engine::FactorKey, engine::SharedFactor> factors_;
};

}  // namespace certiq::bench

#endif  // CERTIQ_TESTS_BENCH_ONE_RUN_CACHE_H_
