#include "engine/gram/feature_order.h"

#include <algorithm>
#include <numeric>

namespace certiq::engine {

std::vector<int64_t> FeatureOrder(Order order, const Statistics& statistics) {
  if (order == Order::kNatural) return {};
  std::vector<int64_t> features(static_cast<size_t>(statistics.features()));
  std::iota(features.begin(), features.end(), 0);
  std::stable_sort(features.begin(), features.end(), [&](int64_t a, int64_t b) {
    return statistics.gram.at(a, a) > statistics.gram.at(b, b);
  });
  return features;
}

}  // namespace certiq::engine
