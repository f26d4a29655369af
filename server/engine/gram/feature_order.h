// Order of quantization, act-order (O1).

#ifndef CERTIQ_ENGINE_GRAM_FEATURE_ORDER_H_
#define CERTIQ_ENGINE_GRAM_FEATURE_ORDER_H_

#include <cstdint>
#include <vector>

#include "engine/gram/gram.h"
#include "engine/spec.h"

namespace certiq::engine {

// Element i is the original feature rounded at place i: empty for the natural
// order; by decreasing |X~_j| (Remark 3.4 of arXiv 2508.04853, "act-order"), equal norms in their
// natural order.
std::vector<int64_t> FeatureOrder(Order order, const Statistics& statistics);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_GRAM_FEATURE_ORDER_H_
