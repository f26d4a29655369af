// Plain rounding (RTN), the yardstick every method is compared with.

#ifndef CERTIQ_ENGINE_NEAREST_H_
#define CERTIQ_ENGINE_NEAREST_H_

#include "engine/grid.h"
#include "engine/run_context.h"
#include "engine/spec.h"
#include "engine/strip_matrix.h"

namespace certiq::engine {

// W - Q with every weight rounded to the nearest level of its grid by itself,
// ties to the even code.
StripMatrix NearestChange(const ResolvedSpec& spec, const Grid& grid, const StripMatrix& weights,
                          const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_NEAREST_H_
