#include "verify.h"

#include <exception>
#include <new>
#include <numeric>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "check_identity.h"
#include "checks.h"
#include "google/protobuf/util/json_util.h"

namespace certiq::verify {
namespace {

absl::StatusOr<Evidence> Gather(const Layer& layer, const v1::Certificate& certificate) {
  const v1::QuantizationSpec& spec = certificate.spec();
  Evidence evidence{certificate, layer, ErrorsOn(layer.fit, layer.w, layer.q.levels, true), {}, {},
                    {},          {}};
  const bool feedback = spec.method() != v1::METHOD_NEAREST &&
                        certificate.outcome() != v1::OUTCOME_FELL_BACK_TO_NEAREST;
  if (feedback) {
    ASSIGN_OR_RETURN(evidence.feedback,
                     Recompute(layer, spec, certificate.lambda_used(), evidence.errors));
    evidence.order = evidence.feedback->order;
    evidence.e = evidence.feedback->e;
    evidence.d = evidence.feedback->factor.d;
    for (Eigen::Index i = 0; i < evidence.d.size(); ++i) {
      if (evidence.Dead(i)) evidence.d[i] = 0;
    }
    return evidence;
  }
  evidence.order.resize(static_cast<size_t>(layer.w.cols()));
  std::iota(evidence.order.begin(), evidence.order.end(), int64_t{0});
  evidence.e = layer.live_w - layer.q.levels;
  evidence.d = layer.gram.diagonal();
  return evidence;
}

absl::StatusOr<VerificationReport> Run(const Sources& sources, const v1::Certificate& certificate) {
  ASSIGN_OR_RETURN(const Layer layer, LoadLayer(sources, certificate));
  VerificationReport report;
  CheckIdentity(sources, certificate, report);
  ASSIGN_OR_RETURN(const Evidence evidence, Gather(layer, certificate));
  CheckData(evidence, report);
  CheckDamping(evidence, report);
  CheckErrors(evidence, report);
  CheckBounds(evidence, report);
  CheckRequiredBits(evidence, report);
  return report;
}

}  // namespace

absl::StatusOr<v1::Certificate> ParseReport(absl::string_view json) {
  v1::Certificate certificate;
  google::protobuf::util::JsonParseOptions options;
  options.ignore_unknown_fields = false;
  const auto status =
      google::protobuf::util::JsonStringToMessage(std::string(json), &certificate, options);
  if (!status.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("not a certificate as protobuf JSON: ", std::string(status.message())));
  }
  if (!certificate.has_spec()) {
    return absl::InvalidArgumentError(
        "the certificate has no spec: it says too little to be checked");
  }
  return certificate;
}

absl::StatusOr<VerificationReport> Verify(const Sources& sources,
                                          const v1::Certificate& certificate) {
  // Eigen and the standard library throw std::bad_alloc.
  try {
    return Run(sources, certificate);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("memory ran out: verifying holds X, W and a few N x N");
  } catch (const std::exception& error) {
    return absl::InternalError(error.what());
  }
}

std::string FindingsText(const VerificationReport& report) {
  std::string text;
  for (const Finding& finding : report.findings()) {
    const char* mark = "ok         ";
    if (finding.verdict == Verdict::kWrong) mark = "WRONG      ";
    if (finding.verdict == Verdict::kNotChecked) mark = "not checked";
    absl::StrAppend(&text, mark, "  ", finding.name, "  ", finding.text, "\n");
  }
  return text;
}

std::string VerdictText(const VerificationReport& report) {
  const int64_t wrong = report.count(Verdict::kWrong);
  const int64_t holds = report.count(Verdict::kHolds);
  if (wrong > 0) {
    return absl::StrCat("The certificate is WRONG: ", wrong, " of ", wrong + holds,
                        " checks failed.\n");
  }
  return absl::StrCat("The certificate holds: ", holds, " checks passed.\n");
}

}  // namespace certiq::verify
