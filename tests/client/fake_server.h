// Fake QuantizationService over TCP, whose handler the test gives.
#ifndef CERTIQ_TESTS_CLIENT_FAKE_SERVER_H_
#define CERTIQ_TESTS_CLIENT_FAKE_SERVER_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "certiq/v1/quantization_service.grpc.pb.h"
#include "google/protobuf/message.h"
#include "grpcpp/server.h"
#include "grpcpp/support/status.h"

namespace certiq::testing {

using ServerStream = grpc::ServerReaderWriter<v1::QuantizeResponse, v1::QuantizeRequest>;
// Handles call number `call`, from 1.
using Handler = std::function<grpc::Status(int call, grpc::ServerContext*, ServerStream*)>;

// Listens on a free loopback port. Handlers may run at the same time.
class FakeServer {
 public:
  explicit FakeServer(Handler handler);
  // Other services, which must outlive this object; Quantize is unimplemented.
  explicit FakeServer(const std::vector<grpc::Service*>& services);
  FakeServer(const FakeServer&) = delete;
  FakeServer& operator=(const FakeServer&) = delete;
  // Ends calls that are still open by cancelling them.
  ~FakeServer();

  const std::string& address() const { return address_; }
  int calls() const { return service_.calls; }

 private:
  struct Service : v1::QuantizationService::Service {
    grpc::Status Quantize(grpc::ServerContext* context, ServerStream* stream) override {
      return handler(++calls, context, stream);
    }
    Handler handler;
    std::atomic<int> calls{0};
  };

  void Start(const std::vector<grpc::Service*>& services);

  Service service_;
  std::string address_;
  std::unique_ptr<grpc::Server> server_;
};

// Everything a client sent, put together again; `error` is set where offsets did not fit.
struct Upload {
  v1::QuantizeHeader header;
  std::string weight;
  std::string x;
  std::string x_quantized;
  // One letter a message, in order: 'h' header, 'w' weights, 'a' activations.
  std::string order;
  size_t largest_message = 0;
  std::string error;
};

Upload ReceiveAll(ServerStream* stream);

// A correct answer for the layer of `upload`: dense weights equal to those sent (as F32), scales,
// and the certificate in two frames.
std::vector<v1::QuantizeResponse> GoodAnswer(const Upload& upload);

// GoodAnswer to the layer that the stream brings, changed by `change` on the way.
Handler Answering(std::function<void(std::vector<v1::QuantizeResponse>*)> change = {});

// RESOURCE_EXHAUSTED with RetryInfo.
grpc::Status BusyStatus(absl::Duration delay);

// INVALID_ARGUMENT with BadRequest.
grpc::Status FieldStatus(const std::string& field, const std::string& description);

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_CLIENT_FAKE_SERVER_H_
