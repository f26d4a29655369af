// Unary calls and paged lists, repeated as the retry policy allows.
#ifndef CERTIQ_CLIENT_CPP_SRC_UNARY_H_
#define CERTIQ_CLIENT_CPP_SRC_UNARY_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/status_macros.h"
#include "connection.h"
#include "retry_loop.h"

namespace certiq {

// Repeated as RunRetryLoop does: for methods that may be repeated.
template <typename Service, typename Request, typename Response>
absl::StatusOr<Response> CallUnary(
    const ServiceConnection<Service>& connection,
    grpc::Status (Service::StubInterface::*method)(grpc::ClientContext*, const Request&, Response*),
    const Request& request, const CallOptions& options) {
  Response response;
  const absl::Status status =
      RunRetryLoop(connection.options, options, [&](absl::Time deadline) -> AttemptOutcome {
        CallContext context(deadline, options.cancel);
        response.Clear();
        return context.Outcome((connection.stub.get()->*method)(context.get(), request, &response),
                               false);
      });
  RETURN_IF_ERROR(status);
  return response;
}

// All items of all pages, moved out of what `items` finds in a response. INTERNAL where a server
// hands out the same page token twice in a row.
template <typename Item, typename Service, typename Request, typename Response, typename Items>
absl::StatusOr<std::vector<Item>> CallPages(
    const ServiceConnection<Service>& connection,
    grpc::Status (Service::StubInterface::*method)(grpc::ClientContext*, const Request&, Response*),
    Request request, const CallOptions& options, const Items& items) {
  std::vector<Item> all;
  for (;;) {
    ASSIGN_OR_RETURN(Response page, CallUnary(connection, method, request, options));
    for (Item& item : *items(&page)) all.push_back(std::move(item));
    if (page.next_page_token().empty()) return all;
    if (page.next_page_token() == request.page_token()) {
      return absl::InternalError(
          "the server's answer breaks the contract: next_page_token: expected another page");
    }
    request.set_page_token(page.next_page_token());
  }
}

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_UNARY_H_
