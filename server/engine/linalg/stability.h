// Causes of a factorisation that was not accepted (D2).

#ifndef CERTIQ_ENGINE_LINALG_STABILITY_H_
#define CERTIQ_ENGINE_LINALG_STABILITY_H_

namespace certiq::engine {

// Why a factorisation was not accepted (D2).
enum class StabilityCause { kNone, kPivot, kNonFinite, kCondition };

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_LINALG_STABILITY_H_
