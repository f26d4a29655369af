// CalibrationService.Accumulate and ImportStatistics: what brings tokens in.

#ifndef CERTIQ_RPC_SERVICES_ACCUMULATE_REACTOR_H_
#define CERTIQ_RPC_SERVICES_ACCUMULATE_REACTOR_H_

#include <memory>
#include <optional>
#include <string>

#include "calibration/calibration.h"
#include "calibration/gram_transfer.h"
#include "certiq/v1/calibration_service.pb.h"
#include "rpc/calls/message_reactor.h"
#include "rpc/services/convert_calibration.h"
#include "runtime/tenant_quota.h"

namespace certiq::server {

// Rows into a calibration. Chunks are folded in its strand; after each the position is written,
// the latest for slow readers. Ends when everything is durable.
class AccumulateReactor final : public MessageReactor<grpc::ServerBidiReactor<Bytes, Bytes>> {
 public:
  AccumulateReactor(grpc::CallbackServerContext* context, const CallEnvironment& environment,
                    const Tenant& tenant)
      : MessageReactor(context, environment, kAccumulateMethod, tenant) {}

  void OnWriteDone(bool ok) override { WriteDone(ok); }

 protected:
  absl::Status First(const Bytes& message) override;
  absl::Status Take(const Bytes& message) override;
  absl::Status End() override;
  bool Next(Bytes* outgoing) override;
  void Drop() override;
  void Gone() override;
  absl::Status Post(WorkerPool::Task task) override;
  // The client goes on with the next server.
  bool EndsWithDrain() const override { return true; }

 private:
  void OnStreamChanged();

  // Set by First, then unchanged.
  std::shared_ptr<Calibration> calibration_;
  std::shared_ptr<LiveStream> live_;
  CountQuota::Place place_;
  ByteBudget::Reservation reservation_;
  // In the strand until the call is over.
  bool opened_ = false;
  // Guarded by mu_.
  bool answering_ = false;
  std::optional<StreamView> said_;
};

// Ready-made sums into a calibration, all of them or none.
class ImportReactor final : public MessageReactor<grpc::ServerReadReactor<Bytes>> {
 public:
  ImportReactor(grpc::CallbackServerContext* context, const CallEnvironment& environment,
                const Tenant& tenant, Bytes* response)
      : MessageReactor(context, environment, kImportStatisticsMethod, tenant),
        response_(response) {}

 protected:
  absl::Status First(const Bytes& message) override;
  absl::Status Take(const Bytes& message) override;
  absl::Status End() override;
  void Drop() override;
  absl::Status Post(WorkerPool::Task task) override;
  int64_t ResponseBytes() const override { return static_cast<int64_t>(response_->Length()); }

 private:
  Bytes* const response_;
  std::shared_ptr<Calibration> calibration_;
  ImportCall call_;
  CountQuota::Place place_;
  // Declared before what it pays for.
  ByteBudget::Reservation reservation_;
  std::optional<StatisticsImport> sums_;
  bool header_taken_ = false;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_SERVICES_ACCUMULATE_REACTOR_H_
