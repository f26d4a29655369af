// Comparisons of a certificate with what was recomputed, by subject. Each function adds one finding
// for each field it covers.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_CHECKS_H_
#define CERTIQ_CLIENT_CPP_VERIFY_CHECKS_H_

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "certiq/v1/certificate.pb.h"
#include "feedback.h"
#include "layer.h"
#include "matrix.h"
#include "token_errors.h"
#include "verification_report.h"

namespace certiq::verify {

// Relative accuracy that the service promises of certified numbers.
inline constexpr double kPromise = 1e-4;
// Bounds are evaluated outward by the service, so that true bounds are never below: initial terms
// and sums by 1e-6, relative; eps_j by 2^-22 |v_j|, v_j the target; sigma_max(X~) by at most 1e-3.
inline constexpr double kOutward = 2e-6;
inline constexpr double kOutwardTarget = 0x1p-22;
inline constexpr double kOutwardSigma = 1e-3;

// The recomputed quantities, and the certificate to compare them with.
struct Evidence {
  const v1::Certificate& certificate;
  const Layer& layer;
  // Output errors on the tokens of the fit.
  OutputErrors errors;
  // Unset for NEAREST and where the service fell back to it.
  std::optional<Feedback> feedback;
  // v - q [R, N] in the order of `order`; W - Q without feedback.
  Matrix e;
  std::vector<int64_t> order;
  // D_j, 0 at dead features; |X~_j|^2 without feedback.
  Vector d;

  const v1::QuantizationSpec& spec() const { return certificate.spec(); }
  bool nearest() const { return spec().rounding() != v1::ROUNDING_STOCHASTIC; }
  // Sweeps of which each row kept one.
  double trials() const { return std::max(1, spec().scale_trials()); }
  bool mismatched() const { return layer.fit.x_quantized.has_value(); }
  // kPromise, and what the service's sums may be off.
  double tolerance() const { return kPromise + (feedback.has_value() ? 2 * feedback->slack : 0); }
  int64_t Feature(Eigen::Index i) const { return order[static_cast<size_t>(i)]; }
  bool Dead(Eigen::Index i) const { return layer.dead[static_cast<size_t>(Feature(i))]; }
  double Step(Eigen::Index r, Eigen::Index i) const { return layer.q.Step(r, Feature(i)); }
  double Target(Eigen::Index r, Eigen::Index i) const {
    return e(r, i) + layer.q.levels(r, Feature(i));
  }
  // How far the service's float32 sum e may be from ours: each of v and w - v was rounded a few
  // times (2^-21 in all), and its U belongs to sums that are off by `slack`.
  double ErrorSlack(Eigen::Index r, Eigen::Index i) const;
};

// (R1) of the error of every row, or of its energy: from what is left with massive tokens alone to
// what float32 products of all tokens may leave.
std::vector<Range> FormRoundings(const Evidence& evidence, bool energies);

// Compares held-out rows, groups, dead features and codes.
void CheckData(const Evidence& evidence, VerificationReport& report);
// Compares lambda with its rule, the attempts, the ladder and the condition.
void CheckDamping(const Evidence& evidence, VerificationReport& report);
// Compares the errors on tokens, those of plain rounding included.
void CheckErrors(const Evidence& evidence, VerificationReport& report);
// Compares C2, bounds, predictions and initial terms, and checks that the bounds hold.
void CheckBounds(const Evidence& evidence, VerificationReport& report);
// Compares clipping and the bits needed.
void CheckRequiredBits(const Evidence& evidence, VerificationReport& report);

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_CHECKS_H_
