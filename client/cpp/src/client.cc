#include "certiq/client.h"

#include <utility>

#include "certiq/v1/quantization_service.grpc.pb.h"
#include "connection.h"
#include "quantize_call.h"
#include "request_check.h"
#include "tries.h"

namespace certiq {

struct Client::Connection : ServiceConnection<v1::QuantizationService> {};

Client::Client(std::unique_ptr<Connection> connection) : connection_(std::move(connection)) {}
Client::~Client() = default;

absl::StatusOr<std::unique_ptr<Client>> Client::Create(ClientOptions options) {
  auto connection = ConnectTo<v1::QuantizationService>(std::move(options));
  if (!connection.ok()) return connection.status();
  return std::unique_ptr<Client>(
      new Client(std::make_unique<Connection>(Connection{*std::move(connection)})));
}

absl::StatusOr<QuantizeResult> Client::Quantize(const QuantizeRequestData& request,
                                                const QuantizeOptions& options) const {
  if (absl::Status status = CheckRequest(request); !status.ok()) return status;
  const ClientOptions& settings = connection_->options;
  QuantizeResult result;
  const absl::Status status = RunTries(settings, options, [&](absl::Time deadline) {
    QuantizeCall call(connection_->stub.get(), request, options, settings.chunk_bytes);
    return call.Run(deadline, &result);
  });
  if (!status.ok()) return status;
  return result;
}

}  // namespace certiq
