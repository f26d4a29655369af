// Client for tests of retries, whose waits take no time.
#ifndef CERTIQ_TESTS_CLIENT_TEST_CLIENT_H_
#define CERTIQ_TESTS_CLIENT_TEST_CLIENT_H_

#include <memory>
#include <stop_token>
#include <string>
#include <vector>

#include "certiq/client.h"

namespace certiq::testing {

// Its waits take no time and are written down. Not movable: the client points back to it.
template <typename Kind>
struct PatientClient {
  explicit PatientClient(const std::string& address, ClientOptions options = {}) {
    options.address = address;
    options.sleep = [this](absl::Duration delay, const std::stop_token& stop) {
      waits.push_back(delay);
      return !stop.stop_requested();
    };
    client = *Kind::Create(options);
  }
  PatientClient(const PatientClient&) = delete;
  PatientClient& operator=(const PatientClient&) = delete;

  const Kind* operator->() const { return client.get(); }

  std::vector<absl::Duration> waits;
  std::unique_ptr<Kind> client;
};

using TestClient = PatientClient<Client>;

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_CLIENT_TEST_CLIENT_H_
