#include "fake_calibrations.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "certiq/tensor.h"

namespace certiq::testing {

v1::StreamProgress FakeStream::Progress(const std::string& id) const {
  v1::StreamProgress progress;
  progress.set_stream_id(id);
  progress.set_received(static_cast<int64_t>(chunks.size()));
  progress.set_durable(durable);
  progress.set_tokens(static_cast<int64_t>(X().size()) / row_bytes);
  return progress;
}

std::string FakeStream::X() const {
  std::string bytes;
  for (const v1::AccumulateChunk& chunk : chunks) bytes += chunk.x();
  return bytes;
}

std::string FakeStream::XQuantized() const {
  std::string bytes;
  for (const v1::AccumulateChunk& chunk : chunks) bytes += chunk.x_quantized();
  return bytes;
}

v1::Calibration* FakeCalibrations::Add(v1::CalibrationState state,
                                       const std::vector<std::string>& labels, int64_t features) {
  v1::Calibration& calibration = calibrations.emplace_back();
  calibration.set_id(absl::StrCat("c", calibrations.size()));
  calibration.set_state(state);
  calibration.set_features(features);
  for (const std::string& label : labels) calibration.add_labels(label);
  return &calibration;
}

grpc::Status FakeCalibrations::Unary(const std::string& method) {
  const int count = ++calls[method];
  return on_unary ? on_unary(method, count).value_or(grpc::Status::OK) : grpc::Status::OK;
}

v1::Calibration* FakeCalibrations::Find(const std::string& id) {
  const auto found = std::find_if(calibrations.begin(), calibrations.end(),
                                  [&id](const v1::Calibration& c) { return c.id() == id; });
  return found == calibrations.end() ? nullptr : &*found;
}

grpc::Status FakeCalibrations::NotFound(const std::string& id) {
  return {grpc::StatusCode::NOT_FOUND, absl::StrCat("no calibration ", id)};
}

grpc::Status FakeCalibrations::CreateCalibration(grpc::ServerContext*,
                                                 const v1::CreateCalibrationRequest* request,
                                                 v1::Calibration* response) {
  const std::lock_guard lock(mutex_);
  std::string& id = request_ids_[request->request_id()];
  if (request->request_id().empty() || id.empty()) {
    v1::Calibration* const made =
        Add(v1::CALIBRATION_STATE_OPEN, {request->labels().begin(), request->labels().end()},
            request->features());
    made->set_kind(request->kind());
    made->set_held_out_fraction(request->held_out_fraction());
    made->mutable_expire_time()->set_seconds(request->ttl().seconds());
    id = made->id();
  }
  *response = *Find(id);
  return Unary("create");
}

grpc::Status FakeCalibrations::Accumulate(grpc::ServerContext*, Chunks* messages) {
  v1::AccumulateRequest message;
  if (!messages->Read(&message) || !message.has_header()) {
    return {grpc::StatusCode::INVALID_ARGUMENT, "no header"};
  }
  const std::lock_guard lock(mutex_);
  const v1::AccumulateHeader header = message.header();
  headers.push_back(header);
  sent.emplace_back();
  const int call = static_cast<int>(sent.size());
  const v1::Calibration* const calibration = Find(header.calibration_id());
  if (calibration == nullptr) return NotFound(header.calibration_id());
  FakeStream& stream = streams[header.stream_id()];
  stream.row_bytes = calibration->features() * DataTypeBytes(header.x());
  if (on_open) {
    if (End end = on_open(call, &stream); end.has_value()) return *end;
  }
  v1::AccumulateResponse response;
  const auto answer = [&] {
    *response.mutable_progress() = stream.Progress(header.stream_id());
    return messages->Write(response);
  };
  answer();
  while (messages->Read(&message)) {
    const auto next = static_cast<int64_t>(stream.chunks.size());
    sent.back().push_back(message.chunk().sequence());
    if (message.chunk().sequence() > next) {
      return {grpc::StatusCode::INVALID_ARGUMENT, "a gap in the sequence"};
    }
    if (message.chunk().sequence() == next) stream.chunks.push_back(message.chunk());
    if (durable_every > 0 && (next + 1) % durable_every == 0) {
      stream.durable = next + 1;
      answer();
    }
    if (on_chunk) {
      if (End end = on_chunk(call, &stream); end.has_value()) return *end;
    }
  }
  stream.durable = static_cast<int64_t>(stream.chunks.size());
  answer();
  return grpc::Status::OK;
}

grpc::Status FakeCalibrations::ImportStatistics(
    grpc::ServerContext*, grpc::ServerReader<v1::ImportStatisticsRequest>* reader,
    v1::ImportStatisticsResponse* response) {
  const std::lock_guard lock(mutex_);
  v1::ImportStatisticsRequest message;
  std::string bytes;
  v1::StatisticsHeader header;
  while (reader->Read(&message)) {
    if (message.has_header()) header = message.header();
    bytes += message.data();
  }
  response->set_already_committed(imported.stream_id() == header.stream_id());
  if (!response->already_committed()) {
    imported = header;
    imported_bytes = bytes;
  }
  return Unary("import");
}

grpc::Status FakeCalibrations::ExportStatistics(
    grpc::ServerContext*, const v1::ExportStatisticsRequest*,
    grpc::ServerWriter<v1::ExportStatisticsResponse>* writer) {
  const std::lock_guard lock(mutex_);
  for (const v1::ExportStatisticsResponse& frame : exported) writer->Write(frame);
  return Unary("export");
}

grpc::Status FakeCalibrations::FinalizeCalibration(grpc::ServerContext*,
                                                   const v1::FinalizeCalibrationRequest* request,
                                                   v1::Calibration* response) {
  const std::lock_guard lock(mutex_);
  finalized = *request;
  v1::Calibration* const calibration = Find(request->calibration_id());
  if (calibration == nullptr) return NotFound(request->calibration_id());
  calibration->set_state(v1::CALIBRATION_STATE_FINALIZED);
  calibration->set_sums_sha256("5a5a");
  *response = *calibration;
  return Unary("finalize");
}

grpc::Status FakeCalibrations::GetCalibration(grpc::ServerContext*,
                                              const v1::GetCalibrationRequest* request,
                                              v1::Calibration* response) {
  const std::lock_guard lock(mutex_);
  const v1::Calibration* const calibration = Find(request->calibration_id());
  if (calibration == nullptr) return NotFound(request->calibration_id());
  *response = *calibration;
  return Unary("get");
}

grpc::Status FakeCalibrations::ListCalibrations(grpc::ServerContext*,
                                                const v1::ListCalibrationsRequest* request,
                                                v1::ListCalibrationsResponse* response) {
  const std::lock_guard lock(mutex_);
  size_t begin = 0;
  if (!request->page_token().empty() && !absl::SimpleAtoi(request->page_token(), &begin)) {
    return {grpc::StatusCode::INVALID_ARGUMENT, "page_token"};
  }
  const size_t limit = request->page_size() > 0 ? static_cast<size_t>(request->page_size()) : 2;
  size_t index = begin;
  for (; index < calibrations.size() && index < begin + limit; ++index) {
    const v1::Calibration& calibration = calibrations[index];
    const auto& labels = calibration.labels();
    if (request->label().empty() ||
        std::find(labels.begin(), labels.end(), request->label()) != labels.end()) {
      *response->add_calibrations() = calibration;
      response->mutable_calibrations()->rbegin()->clear_streams();
    }
  }
  if (index < calibrations.size()) response->set_next_page_token(absl::StrCat(index));
  return Unary("list");
}

grpc::Status FakeCalibrations::DeleteCalibration(grpc::ServerContext*,
                                                 const v1::DeleteCalibrationRequest* request,
                                                 google::protobuf::Empty*) {
  const std::lock_guard lock(mutex_);
  if (Find(request->calibration_id()) == nullptr) return NotFound(request->calibration_id());
  std::erase_if(calibrations,
                [&](const v1::Calibration& c) { return c.id() == request->calibration_id(); });
  return Unary("delete");
}

}  // namespace certiq::testing
