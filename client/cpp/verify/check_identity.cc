#include "check_identity.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "certiq/tensor.h"
#include "tensors.h"

namespace certiq::verify {
namespace {

void CheckSpec(const v1::Certificate& c, VerificationReport& report) {
  const v1::QuantizationSpec& spec = c.spec();
  report.Same("method", v1::Method_Name(c.method()), v1::Method_Name(spec.method()));
  report.Count("bits", c.bits(), spec.bits(), spec.bits());
  report.Same("symmetric", c.symmetric() ? "true" : "false", spec.symmetric() ? "true" : "false");
  report.Count("group_size", c.group_size(), spec.group_size(), spec.group_size());
  report.Same("seed", absl::StrCat(c.seed()), absl::StrCat(spec.seed()));
  const double scale_bits = 8 * static_cast<double>(DataTypeBytes(spec.scale_dtype()));
  const double n = static_cast<double>(c.features());
  const double groups = spec.group_size() == 0 ? 1 : std::ceil(n / spec.group_size());
  const double zero_bits = spec.symmetric() ? 0 : spec.bits();
  report.Close("bits_per_weight", c.bits_per_weight(),
               spec.bits() + (scale_bits + zero_bits) * groups / n, 1e-12);
}

// The activations came with the call, whose digests the certificate then has, or they were summed
// before, where only the sums have one.
void CheckInputs(const Sources& sources, const v1::Certificate& c, VerificationReport& report) {
  const bool summed = !c.calibration_id().empty();
  report.Same("x_sha256", c.x_sha256(), summed ? "" : Sha256Hex(sources.x.data));
  report.Same(
      "x_quantized_sha256", c.x_quantized_sha256(),
      sources.x_quantized.has_value() && !summed ? Sha256Hex(sources.x_quantized->data) : "");
  if (summed) {
    report.NotChecked("calibration_id, sums_sha256",
                      "of sums that are not given; that they are those of these activations shows "
                      "in the numbers");
  } else {
    report.Same("sums_sha256", c.sums_sha256(), "");
  }
}

}  // namespace

void CheckIdentity(const Sources& sources, const v1::Certificate& c, VerificationReport& report) {
  report.Count("schema_version", c.schema_version(), 1, 1);
  report.Same("weights_sha256", c.weights_sha256(), Sha256Hex(sources.weight.data));
  CheckInputs(sources, c, report);
  report.Count("rows", c.rows(), sources.weight.shape[0], sources.weight.shape[0]);
  report.Count("features", c.features(), sources.weight.shape[1], sources.weight.shape[1]);
  CheckSpec(c, report);
  report.NotChecked("engine_version, isa", "a program leaves no trace of its name");
  report.NotChecked("warnings", "for people");
  report.NotChecked("phase_seconds", "wall-clock time leaves no trace");
  report.NotChecked("identity_residual", "a residual of the service's own rounding");
}

}  // namespace certiq::verify
