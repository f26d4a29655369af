#include "certiq/client.h"

#include <utility>

#include "base/status_macros.h"
#include "certiq/v1/quantization_service.grpc.pb.h"
#include "connection.h"
#include "quantize_call.h"
#include "request_check.h"
#include "retry_loop.h"

namespace certiq {

struct Client::Connection : ServiceConnection<v1::QuantizationService> {};

Client::Client(std::unique_ptr<Connection> connection) : connection_(std::move(connection)) {}
Client::~Client() = default;

absl::StatusOr<std::unique_ptr<Client>> Client::Create(ClientOptions options) {
  ASSIGN_OR_RETURN(auto connection, ConnectTo<v1::QuantizationService>(std::move(options)));
  return std::unique_ptr<Client>(
      new Client(std::make_unique<Connection>(Connection{std::move(connection)})));
}

absl::StatusOr<QuantizeResult> Client::Quantize(const QuantizeRequestData& request,
                                                const QuantizeOptions& options) const {
  RETURN_IF_ERROR(CheckRequest(request));
  const ClientOptions& settings = connection_->options;
  QuantizeResult result;
  const absl::Status status = RunRetryLoop(settings, options, [&](absl::Time deadline) {
    QuantizeCall call(connection_->stub.get(), request, options, settings.chunk_bytes);
    return call.Run(deadline, &result);
  });
  RETURN_IF_ERROR(status);
  return result;
}

}  // namespace certiq
