// Random UUIDs.
#ifndef CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_UUID_H_
#define CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_UUID_H_

#include <string>

namespace certiq {

// "2f1c….": version 4 of RFC 4122. Serves as a request_id. Thread-safe.
std::string RandomUuid();

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_UUID_H_
