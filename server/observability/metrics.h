// Prometheus metrics of jobs, workers and RPCs.

#ifndef CERTIQ_OBSERVABILITY_METRICS_H_
#define CERTIQ_OBSERVABILITY_METRICS_H_

#include <memory>
#include <string>

#include "observability/call_observer.h"
#include "observability/observer.h"

namespace certiq::server {

// Implements the observers. Every time series exists from the start, so that a counter reads 0
// before its first event and an event costs an array access. Labels come from closed sets
// (labels.h); none carries text of a client. Thread-safe.
class Metrics final : public Observer, public CallObserver {
 public:
  struct Options {
    // Labels of certiq_build_info.
    std::string version;
    std::string isa;
    // The time that calls and jobs have to end after SIGTERM, in seconds.
    double drain_limit = 0;
  };

  explicit Metrics(const Options& options);
  ~Metrics() override;
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // The process was told to end, `unix_seconds` after the epoch.
  void DrainStarted(double unix_seconds);

  // All families in Prometheus' text format, version 0.0.4.
  std::string Text() const;

  void JobEntered(JobState state) override;
  void JobLeft(JobState state) override;
  void JobFinished(engine::Method method, JobState outcome, double seconds,
                   const engine::LayerCertificate* certificate) override;
  void PhaseTook(engine::Method method, engine::Phase phase, double seconds) override;
  void StabilityFailed(engine::Method method, engine::StabilityCause cause) override;
  void ActivationsFolded(int64_t rows, int64_t features, int64_t bytes) override;
  void Rejected(Rejection reason) override;
  void FactorAsked(bool shared) override;
  void BudgetChanged(int64_t reserved_bytes, int64_t capacity_bytes) override;
  void QueueChanged(int64_t depth, int64_t limit) override;
  void WorkersChanged(int64_t busy, int64_t workers) override;

  void CallStarted(const RpcMethod& method) override;
  void MessageReceived(const RpcMethod& method) override;
  void MessageSent(const RpcMethod& method) override;
  void CallHandled(const RpcMethod& method, absl::StatusCode code, double seconds) override;

 private:
  struct Families;
  const std::unique_ptr<Families> families_;
};

}  // namespace certiq::server

#endif  // CERTIQ_OBSERVABILITY_METRICS_H_
