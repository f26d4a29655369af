// Log sink of the libraries: gRPC and protobuf.

#ifndef CERTIQ_RPC_TRANSPORT_LIBRARY_LOG_H_
#define CERTIQ_RPC_TRANSPORT_LIBRARY_LOG_H_

#include <string>

namespace certiq::server {

// Receives a message of `library`, which is "grpc" or "protobuf", on any thread.
using LibraryLog = void (*)(const char* library, const std::string& message);
// Sends the libraries' messages of the whole process to `sink`, instead of stderr; null drops them.
// Objects that `sink` uses live as long as the process.
void SetLibraryLog(LibraryLog sink);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_LIBRARY_LOG_H_
