// Verification of a certificate against the raw data and the result, in float64 and from the
// formulas alone. Nothing of the service is trusted, and none of its arithmetic is linked.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_VERIFY_H_
#define CERTIQ_CLIENT_CPP_VERIFY_VERIFY_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "certiq/v1/certificate.pb.h"
#include "sources.h"
#include "verification_report.h"

namespace certiq::verify {

// Reads a report: protobuf JSON. INVALID_ARGUMENT for anything malformed, for fields this version
// does not know, and where the resolved spec is missing.
absl::StatusOr<v1::Certificate> ParseReport(absl::string_view json);

// Recomputes every number that can be and compares. INVALID_ARGUMENT where the files do not fit
// together so that nothing can be said; what merely is wrong is a finding. Never throws.
absl::StatusOr<VerificationReport> Verify(const Sources& sources,
                                          const v1::Certificate& certificate);

// A line a finding.
std::string FindingsText(const VerificationReport& report);

// One line.
std::string VerdictText(const VerificationReport& report);

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_VERIFY_H_
