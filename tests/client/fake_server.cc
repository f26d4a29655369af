#include "fake_server.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "certiq/tensor.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"

namespace certiq::testing {
namespace {

int64_t RowBytes(const v1::TensorHeader& tensor) {
  return tensor.shape(1) * DataTypeBytes(tensor.dtype());
}

// Appends rows that must be the next ones.
void Append(const v1::TensorHeader& header, int64_t row_offset, const std::string& data,
            std::string* bytes, std::string* error) {
  const auto row_bytes = static_cast<size_t>(RowBytes(header));
  if (static_cast<size_t>(row_offset) != bytes->size() / row_bytes || data.empty() ||
      data.size() % row_bytes != 0) {
    *error =
        absl::StrCat(header.name(), ": rows at ", row_offset, " after ", bytes->size(), " bytes");
  }
  *bytes += data;
}

grpc::Status WithDetail(grpc::StatusCode code, const std::string& message,
                        const google::protobuf::Message& detail) {
  google::rpc::Status details;
  details.set_code(code);
  details.set_message(message);
  details.add_details()->PackFrom(detail);
  return {code, message, details.SerializeAsString()};
}

}  // namespace

FakeServer::FakeServer(Handler handler) {
  service_.handler = std::move(handler);
  Start({});
}

FakeServer::FakeServer(const std::vector<grpc::Service*>& services) {
  service_.handler = [](int, grpc::ServerContext*, ServerStream*) {
    return grpc::Status(grpc::StatusCode::UNIMPLEMENTED, "");
  };
  Start(services);
}

void FakeServer::Start(const std::vector<grpc::Service*>& services) {
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service_);
  for (grpc::Service* const service : services) builder.RegisterService(service);
  builder.SetMaxReceiveMessageSize(16 << 20);
  server_ = builder.BuildAndStart();
  address_ = absl::StrCat("127.0.0.1:", port);
}

FakeServer::~FakeServer() { server_->Shutdown(std::chrono::system_clock::now()); }

Upload ReceiveAll(ServerStream* stream) {
  Upload upload;
  v1::QuantizeRequest frame;
  while (stream->Read(&frame)) {
    upload.largest_message = std::max(upload.largest_message, frame.ByteSizeLong());
    if (frame.has_header()) {
      upload.order += 'h';
      upload.header = frame.header();
    } else if (frame.has_weight()) {
      upload.order += 'w';
      Append(upload.header.weight(), frame.weight().row_offset(), frame.weight().data(),
             &upload.weight, &upload.error);
    } else if (frame.has_activation()) {
      upload.order += 'a';
      const v1::ActivationChunk& chunk = frame.activation();
      Append(upload.header.x(), chunk.row_offset(), chunk.x(), &upload.x, &upload.error);
      if (upload.header.has_x_quantized()) {
        Append(upload.header.x_quantized(), chunk.row_offset(), chunk.x_quantized(),
               &upload.x_quantized, &upload.error);
      }
    }
  }
  return upload;
}

std::vector<v1::QuantizeResponse> GoodAnswer(const Upload& upload) {
  const int64_t rows = upload.header.weight().shape(0);
  const int64_t features = upload.header.weight().shape(1);
  std::vector<v1::QuantizeResponse> frames(7);
  frames[0].mutable_progress()->set_phase(v1::PHASE_FACTOR);
  frames[1].mutable_progress()->set_phase(v1::PHASE_ROUND);

  v1::ResultHeader* const header = frames[2].mutable_result();
  v1::TensorHeader* const weight = header->add_tensors();
  weight->set_name("weight");
  weight->set_dtype(v1::DATA_TYPE_F32);
  weight->add_shape(rows);
  weight->add_shape(features);
  v1::TensorHeader* const scales = header->add_tensors();
  scales->set_name("scales");
  scales->set_dtype(v1::DATA_TYPE_F32);
  scales->add_shape(rows);
  scales->add_shape(1);
  header->set_total_bytes(4 * rows * (features + 1));

  // The weights in two chunks where there are two rows, each frame small enough for any test.
  const auto split = static_cast<size_t>(rows / 2 * features * 4);
  frames[3].mutable_chunk()->set_data(upload.weight.substr(0, split));
  frames[4].mutable_chunk()->set_data(upload.weight.substr(split));
  frames[4].mutable_chunk()->set_row_offset(rows / 2);
  frames[5].mutable_chunk()->set_tensor(1);
  frames[5].mutable_chunk()->set_data(std::string(static_cast<size_t>(4 * rows), 's'));

  v1::Certificate* const certificate = frames[6].mutable_certificate();
  certificate->set_schema_version(1);
  certificate->set_rows(rows);
  certificate->set_features(features);
  certificate->set_tokens(upload.header.x().shape_size() > 0 ? upload.header.x().shape(0) : 0);
  certificate->set_method(v1::METHOD_OPTQ);
  certificate->set_bits(4);
  certificate->set_outcome(v1::OUTCOME_QUANTIZED);
  for (int64_t row = 0; row < rows / 2; ++row) certificate->add_row_bound(1);
  v1::QuantizeResponse rest;
  for (int64_t row = rows / 2; row < rows; ++row) rest.mutable_certificate()->add_row_bound(2);
  frames.push_back(rest);
  if (split == 0) frames.erase(frames.begin() + 3);
  return frames;
}

Handler Answering(std::function<void(std::vector<v1::QuantizeResponse>*)> change) {
  return [change = std::move(change)](int, grpc::ServerContext*, ServerStream* stream) {
    std::vector<v1::QuantizeResponse> frames = GoodAnswer(ReceiveAll(stream));
    if (change) change(&frames);
    for (const v1::QuantizeResponse& frame : frames) {
      if (!stream->Write(frame)) break;
    }
    return grpc::Status::OK;
  };
}

grpc::Status BusyStatus(absl::Duration delay) {
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(absl::IDivDuration(delay, absl::Seconds(1), &delay));
  retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(delay)));
  return WithDetail(grpc::StatusCode::RESOURCE_EXHAUSTED, "the queue is full", retry);
}

grpc::Status FieldStatus(const std::string& field, const std::string& description) {
  google::rpc::BadRequest bad_request;
  bad_request.add_field_violations()->set_field(field);
  bad_request.mutable_field_violations(0)->set_description(description);
  return WithDetail(grpc::StatusCode::INVALID_ARGUMENT, absl::StrCat(field, ": ", description),
                    bad_request);
}

}  // namespace certiq::testing
