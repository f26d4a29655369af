// Finds bytes that changed by accident, not by intent: XXH3, whose values are fixed since 0.8.0.
// It runs at memory speed, so that reading a tensor is not bound by it as it would be by SHA-256.

#ifndef CERTIQ_STORE_CHECKSUM_H_
#define CERTIQ_STORE_CHECKSUM_H_

#include <cstddef>
#include <cstdint>
#include <span>

namespace certiq::server {

// Different seeds give unrelated values for the same bytes.
uint64_t Checksum(std::span<const std::byte> bytes, uint64_t seed);

}  // namespace certiq::server

#endif  // CERTIQ_STORE_CHECKSUM_H_
