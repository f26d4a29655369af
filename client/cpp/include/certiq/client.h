// Client of the QuantizationService, and the options that all clients share.
//
//   absl::StatusOr<std::unique_ptr<certiq::Client>> client =
//       certiq::Client::Create({.address = "localhost:8470"});
//   certiq::QuantizeRequestData request;
//   request.layer_name = "layer.0";
//   request.spec.set_bits(3);
//   request.weight = {...};  // [R, N]
//   request.x = {...};       // [m, N]
//   absl::StatusOr<certiq::QuantizeResult> result = (*client)->Quantize(request);
#ifndef CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_CLIENT_H_
#define CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_CLIENT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stop_token>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "certiq/retry.h"
#include "certiq/tensor.h"
#include "certiq/v1/certificate.pb.h"
#include "certiq/v1/quantization_service.pb.h"
#include "certiq/v1/spec.pb.h"

namespace certiq {

// Files in PEM, read when the client is created.
struct TlsOptions {
  // Authorities to trust; empty: the system's.
  std::string ca_file = {};
  // Shown to servers that ask for a certificate; both or none.
  std::string cert_file = {};
  std::string key_file = {};
  // The name that the server's certificate must be for; empty: the address's host.
  std::string server_name = {};
};

struct ClientOptions {
  // HOST:PORT.
  std::string address = {};
  // Without it the connection is in clear text.
  std::optional<TlsOptions> tls = {};
  // Sent with every call as "authorization: Bearer TOKEN"; empty: none.
  std::string token = {};
  // Send the token in clear text to other machines too.
  bool allow_cleartext = false;
  RetryPolicy retry = {};
  // How long one attempt to connect may take.
  absl::Duration connect_timeout = absl::Seconds(5);
  // Bytes of tensors in a message; a row that is larger travels alone.
  int64_t chunk_bytes = int64_t{2} << 20;
  // The function that waits between tries.
  Sleeper sleep = SleepUnlessStopped;
};

// One layer. The bytes behind the views must stay until Quantize returns.
struct QuantizeRequestData {
  // For the server's log.
  std::string request_id;
  std::string layer_name;
  // Fields left unset take the server's defaults.
  v1::QuantizationSpec spec;
  // Weights [R, N] of a floating dtype.
  TensorView weight;
  // Activations X [m, N]; required unless calibration_id is set.
  std::optional<TensorView> x;
  // Activations X~, same shape as x, any dtype.
  std::optional<TensorView> x_quantized;
  std::optional<double> held_out_fraction;
  // Rows of one sequence; 0: unknown.
  int32_t sequence_rows = 0;
  std::string calibration_id;
};

// Tensor bytes of the request handed to the connection.
struct UploadProgress {
  int64_t bytes = 0;
  int64_t total_bytes = 0;
};

// The try failed; another one follows.
struct RetryNotice {
  absl::Status error;
  // The try that failed, from 1.
  int attempt = 0;
  absl::Duration delay;
};

using ProgressEvent = std::variant<UploadProgress, v1::Progress, RetryNotice>;

// Options of any call of the library.
struct CallOptions {
  // Called for one event at a time, from the calling thread or one of the client's: it must not
  // throw and should return soon, for the stream waits for it.
  std::function<void(const ProgressEvent&)> progress = {};
  // For the whole call, retries and waits included.
  absl::Duration timeout = absl::InfiniteDuration();
  // Stopping the source of it, from any thread, ends the call with CANCELLED.
  std::stop_token cancel = {};
};

using QuantizeOptions = CallOptions;

struct QuantizeResult {
  // As the server named them: by role, "weight", "scales", … Sizes are checked.
  std::vector<OwnedTensor> tensors;
  v1::Certificate certificate;
};

// OK where the address is HOST:PORT (an IPv6 host in brackets); INVALID_ARGUMENT otherwise.
absl::Status CheckAddress(const std::string& address);

// Thread-safe: any number of calls may run at once on one client, which must outlive them.
class Client {
 public:
  // Does not connect yet. INVALID_ARGUMENT: the address, a limit, the token or a file for TLS makes
  // no sense; FAILED_PRECONDITION: a token that would travel in clear text to another machine.
  static absl::StatusOr<std::unique_ptr<Client>> Create(ClientOptions options);

  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  ~Client();

  // Quantizes one layer; blocks. Sends weights, then activations, and reads the answer meanwhile:
  // a server that rejects early stops the upload. Nothing is kept of a call that fails.
  //
  // Errors: the server's status, its details readable by DetailsOf(status);
  // INVALID_ARGUMENT, before anything is sent, where shapes, dtypes and sizes do not fit together;
  // UNAVAILABLE where no server could be reached;
  // INTERNAL where the server's answer breaks the contract, DATA_LOSS where it is incomplete;
  // CANCELLED, DEADLINE_EXCEEDED by the options. RESOURCE_EXHAUSTED and UNAVAILABLE come back only
  // after the tries that ClientOptions::retry allows.
  absl::StatusOr<QuantizeResult> Quantize(const QuantizeRequestData& request,
                                          const QuantizeOptions& options = {}) const;

 private:
  struct Connection;
  explicit Client(std::unique_ptr<Connection> connection);

  std::unique_ptr<Connection> connection_;
};

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_CLIENT_H_
