// Counts what jobs/ and rpc/ tell, for Prometheus.

#ifndef CERTIQ_METRICS_METRICS_H_
#define CERTIQ_METRICS_METRICS_H_

#include <memory>
#include <string>

#include "jobs/call_observer.h"
#include "jobs/observer.h"

namespace certiq::metrics {

// Every time series exists from the start, so that a counter that never moved reads 0 and a
// handler only looks up an array. Labels come from closed sets; none carries what a client chose.
// Thread-safe.
class Metrics final : public jobs::Observer, public jobs::CallObserver {
 public:
  struct Options {
    // Labels of certiq_build_info.
    std::string version;
    std::string isa;
    // What calls and jobs may take to end after SIGTERM, in seconds.
    double drain_limit = 0;
  };

  explicit Metrics(const Options& options);
  ~Metrics() override;
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // The process was told to end, at so many seconds since the epoch.
  void DrainStarted(double unix_seconds);

  // All families in Prometheus' text format, version 0.0.4.
  std::string Text() const;

  void JobEntered(jobs::JobState state) override;
  void JobLeft(jobs::JobState state) override;
  void JobFinished(engine::Method method, jobs::JobState outcome, double seconds,
                   const engine::LayerCertificate* certificate) override;
  void PhaseTook(engine::Method method, engine::Phase phase, double seconds) override;
  void StabilityFailed(engine::Method method, engine::StabilityCause cause) override;
  void ActivationsFolded(int64_t rows, int64_t features, int64_t bytes) override;
  void Rejected(jobs::Rejection reason) override;
  void FactorAsked(bool shared) override;
  void BudgetChanged(int64_t reserved_bytes, int64_t capacity_bytes) override;
  void QueueChanged(int64_t depth, int64_t limit) override;
  void WorkersChanged(int64_t busy, int64_t workers) override;

  void CallStarted(const jobs::RpcMethod& method) override;
  void MessageReceived(const jobs::RpcMethod& method) override;
  void MessageSent(const jobs::RpcMethod& method) override;
  void CallHandled(const jobs::RpcMethod& method, absl::StatusCode code, double seconds) override;

 private:
  struct Families;
  const std::unique_ptr<Families> families_;
};

}  // namespace certiq::metrics

#endif  // CERTIQ_METRICS_METRICS_H_
