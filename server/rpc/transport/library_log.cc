#include "rpc/transport/library_log.h"

#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>

#include <atomic>

namespace certiq::server {
namespace {

std::atomic<LibraryLog> current_sink{nullptr};

void Send(const char* library, const std::string& message) {
  const LibraryLog sink = current_sink.load();
  if (sink != nullptr) sink(library, message);
}

void FromGrpc(gpr_log_func_args* arguments) { Send("grpc", arguments->message); }

void FromProtobuf(google::protobuf::LogLevel /*level*/, const char* /*file*/, int /*line*/,
                  const std::string& message) {
  Send("protobuf", message);
}

}  // namespace

void SetLibraryLog(LibraryLog sink) {
  current_sink = sink;
  gpr_set_log_function(&FromGrpc);
  google::protobuf::SetLogHandler(&FromProtobuf);
}

}  // namespace certiq::server
