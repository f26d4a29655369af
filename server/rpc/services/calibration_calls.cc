#include "rpc/services/calibration_calls.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "certiq/v1/calibration_service.grpc.pb.h"
#include "rpc/calls/refuse.h"
#include "rpc/calls/sending_reactor.h"
#include "rpc/calls/unary_reactor.h"
#include "rpc/services/accumulate_reactor.h"
#include "rpc/services/convert_calibration.h"

namespace certiq::server {
namespace {

using Context = grpc::CallbackServerContext;
using CalibrationPtr = std::shared_ptr<Calibration>;

// Float64 elements in one message: 1 MiB.
constexpr int64_t kExportElements = int64_t{1} << 17;

// The sums of one portion, as they are when the call comes.
class ExportReactor final : public SendingReactor<v1::ExportStatisticsResponse> {
 public:
  ExportReactor(Context* context, const CallEnvironment& environment, const Tenant& tenant,
                CalibrationPtr calibration, bool held_out, MatrixLayout layout,
                int64_t request_bytes)
      : SendingReactor(context, environment, kExportStatisticsMethod, tenant, request_bytes),
        calibration_(std::move(calibration)),
        held_out_(held_out),
        layout_(layout) {
    life_.summary.calibration_id = calibration_->id();
  }

 protected:
  absl::StatusOr<Made> Make(v1::ExportStatisticsResponse& message) override {
    if (!export_.has_value()) return Begun(message);
    export_->Next(kExportElements, values_);
    if (values_.empty()) return Made::kEnd;
    message.set_data(reinterpret_cast<const char*>(values_.data()),
                     values_.size() * sizeof(double));
    return Made::kMessage;
  }
  absl::Status Post(WorkerPool::Task task) override {
    return begun_ ? env_.jobs.pool.Post(std::move(task))
                  : calibration_->strand().Post(std::move(task));
  }
  void Gone() override { snapshot_ = {}; }

 private:
  absl::StatusOr<Made> Begun(v1::ExportStatisticsResponse& message) {
    absl::StatusOr<Snapshot> snapshot = calibration_->Export(held_out_);
    if (!snapshot.ok()) return snapshot.status();
    snapshot_ = *std::move(snapshot);
    begun_ = true;
    v1::StatisticsHeader& header = *message.mutable_header();
    header.set_calibration_id(calibration_->id());
    header.set_tokens(snapshot_.sums == nullptr ? 0 : snapshot_.sums->tokens);
    header.set_portion(held_out_ ? v1::PORTION_HELD_OUT : v1::PORTION_FIT);
    header.set_dtype(v1::DATA_TYPE_F64);
    header.set_layout(layout_ == MatrixLayout::kUpper ? v1::MATRIX_LAYOUT_UPPER
                                                      : v1::MATRIX_LAYOUT_FULL);
    header.set_features(calibration_->features());
    header.set_kind(KindOf(calibration_->mismatched()));
    export_.emplace(snapshot_.sums, calibration_->features(), calibration_->mismatched(), layout_);
    return Made::kMessage;
  }

  const CalibrationPtr calibration_;
  const bool held_out_;
  const MatrixLayout layout_;
  bool begun_ = false;
  Snapshot snapshot_;
  std::optional<StatisticsExport> export_;
  std::vector<double> values_;
};

class CalibrationService final
    : public v1::CalibrationService::WithCallbackMethod_CreateCalibration<
          v1::CalibrationService::WithRawCallbackMethod_Accumulate<
              v1::CalibrationService::WithRawCallbackMethod_ImportStatistics<
                  v1::CalibrationService::WithCallbackMethod_ExportStatistics<
                      v1::CalibrationService::WithCallbackMethod_FinalizeCalibration<
                          v1::CalibrationService::WithCallbackMethod_GetCalibration<
                              v1::CalibrationService::WithCallbackMethod_ListCalibrations<
                                  v1::CalibrationService::WithCallbackMethod_DeleteCalibration<
                                      v1::CalibrationService::Service>>>>>>>> {
 public:
  explicit CalibrationService(const CallEnvironment& environment) : env_(environment) {}

  grpc::ServerUnaryReactor* CreateCalibration(Context* context,
                                              const v1::CreateCalibrationRequest* request,
                                              v1::Calibration* response) override {
    return Answer(context, kCreateCalibrationMethod, Scope::kWrite, *request, response,
                  [this, request, response](const Tenant& tenant, const CalibrationPtr&) {
                    const auto made = Create(tenant, *request);
                    CountRejection(made.status(), env_.jobs.observer);
                    if (made.ok()) *response = ToProto((*made)->View(true));
                    return made.status();
                  });
  }

  grpc::ServerBidiReactor<Bytes, Bytes>* Accumulate(Context* context) override {
    const auto tenant = env_.auth->Authenticate(*context, Scope::kWrite);
    if (!tenant.ok()) {
      return Refuse<grpc::ServerBidiReactor<Bytes, Bytes>>(env_, kAccumulateMethod,
                                                           tenant.status());
    }
    auto* const reactor = new AccumulateReactor(context, env_, *tenant);
    reactor->Begin();
    return reactor;
  }

  grpc::ServerReadReactor<Bytes>* ImportStatistics(Context* context, Bytes* response) override {
    const auto tenant = env_.auth->Authenticate(*context, Scope::kWrite);
    if (!tenant.ok()) {
      return Refuse<grpc::ServerReadReactor<Bytes>>(env_, kImportStatisticsMethod, tenant.status());
    }
    auto* const reactor = new ImportReactor(context, env_, *tenant, response);
    reactor->Begin();
    return reactor;
  }

  grpc::ServerWriteReactor<v1::ExportStatisticsResponse>* ExportStatistics(
      Context* context, const v1::ExportStatisticsRequest* request) override {
    using Reactor = grpc::ServerWriteReactor<v1::ExportStatisticsResponse>;
    const auto refuse = [this](const absl::Status& status) {
      return Refuse<Reactor>(env_, kExportStatisticsMethod, status);
    };
    const auto tenant = env_.auth->Authenticate(*context, Scope::kRead);
    if (!tenant.ok()) return refuse(tenant.status());
    auto calibration = env_.calibrations.Find(*tenant, request->calibration_id());
    if (!calibration.ok()) return refuse(calibration.status());
    const auto held_out = FromProto(request->portion());
    if (!held_out.ok()) return refuse(held_out.status());
    const auto layout = FromProto(request->layout(), MatrixLayout::kUpper);
    if (!layout.ok()) return refuse(layout.status());
    auto* const reactor =
        new ExportReactor(context, env_, *tenant, *std::move(calibration), *held_out, *layout,
                          static_cast<int64_t>(request->ByteSizeLong()));
    reactor->Begin();
    return reactor;
  }

  grpc::ServerUnaryReactor* FinalizeCalibration(Context* context,
                                                const v1::FinalizeCalibrationRequest* request,
                                                v1::Calibration* response) override {
    return OnStrand(context, kFinalizeCalibrationMethod, Scope::kWrite, *request, response,
                    [request, response](const Tenant&, const CalibrationPtr& calibration) {
                      std::optional<int64_t> tokens;
                      if (request->has_expected_tokens()) tokens = request->expected_tokens();
                      absl::Status finalized =
                          calibration->Finalize(tokens, {request->expected_stream_ids().begin(),
                                                         request->expected_stream_ids().end()});
                      if (finalized.ok()) *response = ToProto(calibration->View(true));
                      return finalized;
                    });
  }

  grpc::ServerUnaryReactor* GetCalibration(Context* context,
                                           const v1::GetCalibrationRequest* request,
                                           v1::Calibration* response) override {
    return Answer(context, kGetCalibrationMethod, Scope::kRead, *request, response,
                  [this, request, response](const Tenant& tenant, const CalibrationPtr&) {
                    const auto found = env_.calibrations.Find(tenant, request->calibration_id());
                    if (found.ok()) *response = ToProto((*found)->View(true));
                    return found.status();
                  });
  }

  grpc::ServerUnaryReactor* ListCalibrations(Context* context,
                                             const v1::ListCalibrationsRequest* request,
                                             v1::ListCalibrationsResponse* response) override {
    return Answer(context, kListCalibrationsMethod, Scope::kRead, *request, response,
                  [this, request, response](const Tenant& tenant, const CalibrationPtr&) {
                    const auto page = env_.calibrations.List(
                        tenant, request->label(), request->page_size(), request->page_token());
                    if (!page.ok()) return page.status();
                    for (const auto& view : page->items) {
                      *response->add_calibrations() = ToProto(view);
                    }
                    response->set_next_page_token(page->next_page_token);
                    return absl::OkStatus();
                  });
  }

  grpc::ServerUnaryReactor* DeleteCalibration(Context* context,
                                              const v1::DeleteCalibrationRequest* request,
                                              google::protobuf::Empty* response) override {
    return OnStrand(context, kDeleteCalibrationMethod, Scope::kWrite, *request, response,
                    [this](const Tenant&, const CalibrationPtr& calibration) {
                      return env_.calibrations.Remove(calibration);
                    });
  }

 private:
  using Work = std::function<absl::Status(const Tenant&, const CalibrationPtr&)>;

  absl::StatusOr<CalibrationPtr> Create(const Tenant& tenant,
                                        const v1::CreateCalibrationRequest& request) {
    if (!env_.jobs.pool.admitting()) return env_.jobs.pool.Admit().status();
    const auto asked = FromProto(request);
    if (!asked.ok()) return asked.status();
    return env_.calibrations.Create(tenant, *asked);
  }

  // On the pool, without a calibration.
  template <typename Request, typename Response>
  grpc::ServerUnaryReactor* Answer(Context* context, const RpcMethod& method, Scope scope,
                                   const Request& request, Response* response, Work work) {
    const auto tenant = env_.auth->Authenticate(*context, scope);
    if (!tenant.ok()) return Refuse<grpc::ServerUnaryReactor>(env_, method, tenant.status());
    return Start(method, *tenant, request, response, nullptr, std::move(work));
  }

  // In the strand of the calibration that the request names.
  template <typename Request, typename Response>
  grpc::ServerUnaryReactor* OnStrand(Context* context, const RpcMethod& method, Scope scope,
                                     const Request& request, Response* response, Work work) {
    const auto tenant = env_.auth->Authenticate(*context, scope);
    if (!tenant.ok()) return Refuse<grpc::ServerUnaryReactor>(env_, method, tenant.status());
    auto calibration = env_.calibrations.Find(*tenant, request.calibration_id());
    if (!calibration.ok()) {
      return Refuse<grpc::ServerUnaryReactor>(env_, method, calibration.status());
    }
    return Start(method, *tenant, request, response, *std::move(calibration), std::move(work));
  }

  template <typename Request, typename Response>
  grpc::ServerUnaryReactor* Start(const RpcMethod& method, const Tenant& tenant,
                                  const Request& request, Response* response,
                                  CalibrationPtr calibration, Work work) {
    auto* const reactor = new UnaryReactor<Response>(
        env_, method, tenant, static_cast<int64_t>(request.ByteSizeLong()), response);
    if (calibration != nullptr) reactor->summary().calibration_id = calibration->id();
    Strand* const strand = calibration == nullptr ? nullptr : &calibration->strand();
    reactor->Begin(env_.jobs.pool, strand,
                   [tenant, calibration = std::move(calibration), work = std::move(work)] {
                     return work(tenant, calibration);
                   });
    return reactor;
  }

  const CallEnvironment& env_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeCalibrationService(const CallEnvironment& environment) {
  return std::make_unique<CalibrationService>(environment);
}

}  // namespace certiq::server
