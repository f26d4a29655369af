// CalibrationService.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/status_macros.h"
#include "calibration/gram_transfer.h"
#include "certiq/v1/calibration_service.pb.h"
#include "contract/enums.h"
#include "rpc/calls/call.h"
#include "rpc/calls/unary_call.h"
#include "rpc/services/accumulate_call.h"
#include "rpc/services/convert_calibration.h"
#include "rpc/services/services.h"

namespace certiq::server {
namespace {

// Float64 elements in one message: 1 MiB.
constexpr int64_t kExportElements = int64_t{1} << 17;

// Ready-made sums into a calibration, all of them or none. Their bytes are parsed beside other
// streams' work; only adding them needs the strand.
class ImportCall final : public Call {
 public:
  explicit ImportCall(CallStart start) : Call(std::move(start), OnDrain::kRefuse) {}

 protected:
  absl::Status Take(const Bytes& message) override {
    ASSIGN_OR_RETURN(const v1::ImportStatisticsRequest request,
                     Parse<v1::ImportStatisticsRequest>(message, "an ImportStatisticsRequest"));
    const bool data = request.payload_case() == v1::ImportStatisticsRequest::kData;
    if (!sums_.has_value()) {
      if (!request.has_header()) return HeaderExpected(data ? "data" : "none");
      return TakeHeader(request.header());
    }
    if (!data) return HeaderMisplaced();
    return sums_->Append(AsBytes(request.data()));
  }

  absl::Status End() override {
    if (!sums_.has_value()) return HeaderMissing();
    ASSIGN_OR_RETURN(const engine::Statistics sums, sums_->Finish(asked_.tokens));
    ASSIGN_OR_RETURN(const bool known,
                     env_.calibrations.Import(tenant_, calibration_id_, partial_, asked_.stream_id,
                                              asked_.held_out, sums));
    ASSIGN_OR_RETURN(const CalibrationView view, env_.calibrations.Get(tenant_, calibration_id_));
    v1::ImportStatisticsResponse response;
    response.set_already_committed(known);
    *response.mutable_calibration() = ToProto(view);
    return Respond(response);
  }

  absl::Status Post(WorkerPool::Task task) override {
    if (partial_ == nullptr || !half_closed()) return env_.environment.pool.Post(std::move(task));
    return partial_->strand().Post(std::move(task));
  }

  void Drop() override {
    sums_.reset();
    holdings_ = StreamHoldings();
  }

 private:
  absl::Status TakeHeader(const v1::StatisticsHeader& header) {
    ASSIGN_OR_RETURN(const CalibrationRecord record,
                     env_.calibrations.Find(tenant_, header.calibration_id()));
    ASSIGN_OR_RETURN(asked_, ReadStatisticsHeader(header, record));
    ASSIGN_OR_RETURN(holdings_,
                     HoldStream(env_.environment, tenant_,
                                StatisticsImport::BytesFor(record.features(), record.mismatched()),
                                "importing these sums"));
    ASSIGN_OR_RETURN(partial_, env_.calibrations.Partial(tenant_, record.id()));
    calibration_id_ = record.id();
    life_.summary.features = record.features();
    life_.summary.calibration_id = record.id();
    life_.summary.stream_id = asked_.stream_id;
    life_.summary.tokens = asked_.tokens;
    sums_.emplace(record.features(), record.mismatched(), asked_.dtype, asked_.layout);
    return absl::OkStatus();
  }

  ImportRequest asked_;
  std::string calibration_id_;
  std::shared_ptr<PartialSums> partial_;
  // Declared before what it pays for.
  StreamHoldings holdings_;
  std::optional<StatisticsImport> sums_;
};

// The sums of one portion, as they are when the call comes.
class ExportCall final : public Call {
 public:
  explicit ExportCall(CallStart start) : Call(std::move(start), OnDrain::kIgnore) {}

 protected:
  absl::Status Take(const Bytes& message) override {
    ASSIGN_OR_RETURN(const v1::ExportStatisticsRequest request,
                     Parse<v1::ExportStatisticsRequest>(message, "an ExportStatisticsRequest"));
    ASSIGN_OR_RETURN(record_, env_.calibrations.Find(tenant_, request.calibration_id()));
    ASSIGN_OR_RETURN(held_out_, ReadPortion(request.portion()));
    ASSIGN_OR_RETURN(layout_, ReadLayout(request.layout(), MatrixLayout::kUpper));
    ASSIGN_OR_RETURN(partial_, env_.calibrations.Partial(tenant_, request.calibration_id()));
    life_.summary.calibration_id = record_.id();
    // A message's values, the message, and one that the client has not read yet.
    const int64_t elements = std::min(kExportElements, 2 * record_.features() * record_.features());
    return Hold(limits_.held_bytes + 3 * elements * int64_t{sizeof(double)});
  }

  // In the strand while rows may still come.
  absl::Status End() override {
    ASSIGN_OR_RETURN(snapshot_,
                     env_.calibrations.Export(tenant_, record_.id(), partial_, held_out_));
    return absl::OkStatus();
  }

  absl::Status Post(WorkerPool::Task task) override {
    if (partial_ == nullptr) return env_.environment.pool.Post(std::move(task));
    return partial_->strand().Post(std::move(task));
  }

  absl::StatusOr<Produced> Produce(Bytes* outgoing) override {
    if (!ended()) return Produced::kNothingYet;
    v1::ExportStatisticsResponse response;
    if (!export_.has_value()) {
      v1::StatisticsHeader& header = *response.mutable_header();
      header.set_calibration_id(record_.id());
      header.set_tokens(snapshot_.sums == nullptr ? 0 : snapshot_.sums->tokens);
      header.set_portion(held_out_ ? v1::PORTION_HELD_OUT : v1::PORTION_FIT);
      header.set_dtype(v1::DATA_TYPE_F64);
      header.set_layout(layout_ == MatrixLayout::kUpper ? v1::MATRIX_LAYOUT_UPPER
                                                        : v1::MATRIX_LAYOUT_FULL);
      header.set_features(record_.features());
      header.set_kind(KindOf(record_.mismatched()));
      export_.emplace(snapshot_.sums, record_.features(), record_.mismatched(), layout_);
    } else {
      export_->Next(kExportElements, values_);
      if (values_.empty()) return Produced::kEnd;
      response.set_data(reinterpret_cast<const char*>(values_.data()),
                        values_.size() * sizeof(double));
    }
    RETURN_IF_ERROR(Serialize(response, outgoing));
    return Produced::kMessage;
  }

  void Gone() override { snapshot_ = {}; }

 private:
  CalibrationRecord record_;
  bool held_out_ = false;
  MatrixLayout layout_ = MatrixLayout::kUpper;
  std::shared_ptr<PartialSums> partial_;
  SumsSnapshot snapshot_;
  std::optional<StatisticsExport> export_;
  std::vector<double> values_;
};

// One request and one answer about a calibration that rows may be folded into: the work is done in
// its strand.
template <typename Request, typename Response>
class CalibrationCall final : public Call {
 public:
  using Work = std::function<absl::Status(const CallEnvironment&, const Tenant&, const Request&,
                                          const std::shared_ptr<PartialSums>&, Response&)>;

  CalibrationCall(CallStart start, Work work)
      : Call(std::move(start), OnDrain::kIgnore), work_(std::move(work)) {}

 protected:
  absl::Status Take(const Bytes& message) override {
    ASSIGN_OR_RETURN(request_, Parse<Request>(message, Request::descriptor()->name().c_str()));
    ASSIGN_OR_RETURN(partial_, env_.calibrations.Partial(tenant_, request_.calibration_id()));
    life_.summary.calibration_id = request_.calibration_id();
    return absl::OkStatus();
  }

  absl::Status End() override {
    Response response;
    RETURN_IF_ERROR(work_(env_, tenant_, request_, partial_, response));
    return Respond(response);
  }

  absl::Status Post(WorkerPool::Task task) override {
    if (partial_ == nullptr) return env_.environment.pool.Post(std::move(task));
    return partial_->strand().Post(std::move(task));
  }

 private:
  const Work work_;
  Request request_;
  std::shared_ptr<PartialSums> partial_;
};

absl::Status CreateCalibration(const CallEnvironment& env, const Tenant& tenant,
                               const v1::CreateCalibrationRequest& asked,
                               v1::Calibration& calibration) {
  ASSIGN_OR_RETURN(const CalibrationRequest read, ReadCreateRequest(asked));
  ASSIGN_OR_RETURN(const CalibrationView made, env.calibrations.Create(tenant, read));
  calibration = ToProto(made);
  return absl::OkStatus();
}

absl::Status FinalizeCalibration(const CallEnvironment& env, const Tenant& tenant,
                                 const v1::FinalizeCalibrationRequest& asked,
                                 const std::shared_ptr<PartialSums>& partial,
                                 v1::Calibration& calibration) {
  FinalizeExpectations expected;
  if (asked.has_expected_tokens()) expected.tokens = asked.expected_tokens();
  expected.stream_ids.assign(asked.expected_stream_ids().begin(),
                             asked.expected_stream_ids().end());
  RETURN_IF_ERROR(env.calibrations.Finalize(tenant, asked.calibration_id(), partial, expected));
  ASSIGN_OR_RETURN(const CalibrationView view,
                   env.calibrations.Get(tenant, asked.calibration_id()));
  calibration = ToProto(view);
  return absl::OkStatus();
}

absl::Status GetCalibration(const CallEnvironment& env, const Tenant& tenant,
                            const v1::GetCalibrationRequest& asked, v1::Calibration& calibration) {
  ASSIGN_OR_RETURN(const CalibrationView view,
                   env.calibrations.Get(tenant, asked.calibration_id()));
  calibration = ToProto(view);
  return absl::OkStatus();
}

absl::Status ListCalibrations(const CallEnvironment& env, const Tenant& tenant,
                              const v1::ListCalibrationsRequest& asked,
                              v1::ListCalibrationsResponse& list) {
  ASSIGN_OR_RETURN(const PageRequest page, ReadPageRequest(asked.page_size(), asked.page_token()));
  ASSIGN_OR_RETURN(
      const std::vector<CalibrationView> views,
      env.calibrations.List(tenant, asked.label(), page, *list.mutable_next_page_token()));
  for (const CalibrationView& view : views) *list.add_calibrations() = ToProto(view);
  return absl::OkStatus();
}

absl::Status DeleteCalibration(const CallEnvironment& env, const Tenant& tenant,
                               const v1::DeleteCalibrationRequest& asked,
                               const std::shared_ptr<PartialSums>& partial,
                               google::protobuf::Empty& /*nothing*/) {
  return env.calibrations.Remove(tenant, asked.calibration_id(), partial);
}

}  // namespace

void AddCalibrationMethods(Router& router) {
  router.Add<UnaryCall<v1::CreateCalibrationRequest, v1::Calibration>>(
      kCreateCalibrationMethod, Scope::kWrite, {}, OnDrain::kRefuse, CreateCalibration);
  // A stream of rows may be silent for as long as its source computes: it holds little.
  router.Add<AccumulateCall>(
      kAccumulateMethod, Scope::kWrite,
      {.message_bytes = kMaxMessageBytes, .held_bytes = 0, .idle = std::chrono::milliseconds(0)});
  router.Add<ImportCall>(kImportStatisticsMethod, Scope::kWrite,
                         {.message_bytes = kMaxMessageBytes});
  router.Add<ExportCall>(kExportStatisticsMethod, Scope::kRead, {});
  // It may name every stream of a calibration.
  router.Add<CalibrationCall<v1::FinalizeCalibrationRequest, v1::Calibration>>(
      kFinalizeCalibrationMethod, Scope::kWrite,
      {.message_bytes = int64_t{1} << 20, .held_bytes = int64_t{6} << 20}, FinalizeCalibration);
  router.Add<UnaryCall<v1::GetCalibrationRequest, v1::Calibration>>(
      kGetCalibrationMethod, Scope::kRead, {}, OnDrain::kIgnore, GetCalibration);
  router.Add<UnaryCall<v1::ListCalibrationsRequest, v1::ListCalibrationsResponse>>(
      kListCalibrationsMethod, Scope::kRead, {}, OnDrain::kIgnore, ListCalibrations);
  router.Add<CalibrationCall<v1::DeleteCalibrationRequest, google::protobuf::Empty>>(
      kDeleteCalibrationMethod, Scope::kWrite, {}, DeleteCalibration);
}

}  // namespace certiq::server
