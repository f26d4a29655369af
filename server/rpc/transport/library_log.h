// What gRPC and protobuf want to say, which they write to stderr by default.

#ifndef CERTIQ_RPC_TRANSPORT_LIBRARY_LOG_H_
#define CERTIQ_RPC_TRANSPORT_LIBRARY_LOG_H_

#include <string>

namespace certiq::server {

// Sends the libraries' messages to `sink` from now on, from any thread: `library` is "grpc" or
// "protobuf". For the whole process; null drops them. What `sink` uses lives as long as the
// process.
using LibraryLog = void (*)(const char* library, const std::string& message);
void SetLibraryLog(LibraryLog sink);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_LIBRARY_LOG_H_
