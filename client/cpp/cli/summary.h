// The summary of a certificate for people.
#ifndef CERTIQ_CLIENT_CPP_CLI_SUMMARY_H_
#define CERTIQ_CLIENT_CPP_CLI_SUMMARY_H_

#include <cstdint>
#include <string>

#include "certiq/tensor.h"
#include "certiq/v1/certificate.pb.h"

namespace certiq::cli {

// Aligned lines, each with its newline. What the certificate does not say is left out, and the type
// of the weights where it is DATA_TYPE_UNSPECIFIED.
std::string SummaryText(const std::string& layer, v1::DataType weight_dtype,
                        const v1::Certificate& certificate);

// Rows whose undamped error is within their bound, up to rounding of the last digits.
int64_t RowsWithinBound(const v1::Certificate& certificate);

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_SUMMARY_H_
