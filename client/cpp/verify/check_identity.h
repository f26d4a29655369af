// Comparison of digests, shapes and the spec.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_CHECK_IDENTITY_H_
#define CERTIQ_CLIENT_CPP_VERIFY_CHECK_IDENTITY_H_

#include "certiq/v1/certificate.pb.h"
#include "sources.h"
#include "verification_report.h"

namespace certiq::verify {

// Adds a finding for each of them, and NotChecked for fields that leave no trace in the data.
void CheckIdentity(const Sources& sources, const v1::Certificate& certificate,
                   VerificationReport& report);

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_CHECK_IDENTITY_H_
