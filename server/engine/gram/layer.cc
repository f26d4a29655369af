#include "engine/gram/layer.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "engine/gram/feature_order.h"

namespace certiq::engine {
namespace {

void ZeroFeatures(const std::vector<bool>& dead, StripMatrix& weights) {
  const int64_t width = StripMatrix::StripRows();
  for (int64_t s = 0; s < weights.strips(); ++s) {
    for (int64_t j = 0; j < weights.features(); ++j) {
      if (dead[j]) std::fill_n(weights.strip(s) + j * width, width, 0.0f);
    }
  }
}

}  // namespace

WorkingLayer MakeWorkingLayer(const ResolvedSpec& spec, SharedStatistics sums, StripMatrix weights,
                              const RunContext& context) {
  WorkingLayer layer;
  layer.order = FeatureOrder(spec.order, *sums);
  layer.sums =
      layer.order.empty()
          ? std::move(sums)
          : std::make_shared<const Statistics>(Permute(*sums, layer.order, *context.executor));
  layer.reference = layer.order.empty() ? std::move(weights)
                                        : PermuteColumns(weights, layer.order, *context.executor);
  layer.dead.resize(static_cast<size_t>(layer.statistics().features()));
  for (size_t j = 0; j < layer.dead.size(); ++j) {
    const auto at = static_cast<int64_t>(j);
    layer.dead[j] = layer.statistics().gram.at(at, at) == 0;
  }
  if (std::find(layer.dead.begin(), layer.dead.end(), true) != layer.dead.end()) {
    layer.zeroed = layer.reference;
    ZeroFeatures(layer.dead, layer.zeroed);
  }
  return layer;
}

}  // namespace certiq::engine
