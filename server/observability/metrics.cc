#include "observability/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <array>
#include <cmath>
#include <cstring>
#include <sstream>

#include "observability/labels.h"

namespace certiq::server {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;
using Buckets = Histogram::BucketBoundaries;

// The phases of certiq_job_seconds: all but kReceive, which is the client's time.
constexpr std::array kTimedPhases = {engine::Phase::kQueue,     engine::Phase::kFactor,
                                     engine::Phase::kRound,     engine::Phase::kCertify,
                                     engine::Phase::kReference, engine::Phase::kPack};
constexpr int kMinBits = 2;
constexpr int kMaxBits = 8;
constexpr auto& kRpcs = kRpcMethods;

// Series that do not exist, such as those of a state that is not final, are null.
template <typename T>
using ByMethod = ByLabel<engine::Method, T>;
template <typename T>
using ByBits = std::array<T, kMaxBits - kMinBits + 1>;
template <typename T>
using ByRpc = std::array<T, kRpcs.size()>;

Buckets SecondsBuckets() {
  return {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1,
          2.5,   5,      10,    25,   60,    120,  300, 600,  1800};
}
Buckets RelativeErrorBuckets() {
  return {1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2};
}
// The error is at most its bound, so the ratio is at most 1.
Buckets TightnessBuckets() { return {0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1}; }
// Retries raise lambda by powers of ten. The boundaries lie between those, where rounding does not
// move a ratio across one.
Buckets LambdaRatioBuckets() { return {1, 3, 30, 300, 3e3, 3e4, 3e6, 3e9}; }

}  // namespace

struct Metrics::Families {
  prometheus::Registry registry;

  Family<Counter>& Counters(const char* name, const char* help) {
    return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
  }
  Family<Gauge>& Gauges(const char* name, const char* help) {
    return prometheus::BuildGauge().Name(name).Help(help).Register(registry);
  }
  Family<Histogram>& Histograms(const char* name, const char* help) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
  }

  ByLabel<JobState, Gauge*> jobs;
  ByMethod<ByLabel<JobState, Counter*>> jobs_total;
  ByMethod<ByLabel<engine::Phase, Histogram*>> job_seconds;
  ByMethod<ByLabel<JobState, Histogram*>> job_duration;
  Gauge* queue_depth;
  Gauge* queue_limit;
  Gauge* workers_busy;
  Gauge* workers;
  Gauge* drain_start;
  Gauge* drain_limit;
  ByMethod<ByBits<Counter*>> weights_quantized;
  Counter* activation_rows;
  Counter* activation_bytes;
  Counter* flops_statistics;
  Counter* flops_factor;
  Counter* flops_round;
  ByMethod<ByLabel<engine::StabilityCause, Counter*>> stability_failures;
  ByMethod<Counter*> fallbacks;
  Histogram* lambda_ratio;
  ByMethod<ByBits<Histogram*>> relative_error;
  ByMethod<ByBits<Histogram*>> bound_tightness;
  Counter* factor_hits;
  Counter* factor_misses;
  Counter* clipped_weights;
  Counter* dead_features;
  Gauge* budget;
  Gauge* reserved;
  ByLabel<Rejection, Counter*> rejected;

  ByRpc<Counter*> rpc_started;
  ByRpc<Counter*> rpc_received;
  ByRpc<Counter*> rpc_sent;
  ByRpc<Histogram*> rpc_seconds;
  ByRpc<ByLabel<absl::StatusCode, Counter*>> rpc_handled;

  Families() {
    BuildJobs();
    BuildPool();
    BuildResults();
    BuildRpcs();
  }

  void BuildJobs() {
    auto& states = Gauges("certiq_jobs", "Jobs now in each state; final states count kept jobs.");
    for (const JobState state : Labelled<JobState>()) {
      jobs[state] = &states.Add({{"state", LabelOf(state)}});
    }
    auto& finished =
        Counters("certiq_jobs_total", "Jobs that ended, by how; a Quantize call is a job too.");
    auto& seconds = Histograms("certiq_job_seconds", "Wall clock of a job's phases, in seconds.");
    auto& duration = Histograms("certiq_job_duration_seconds",
                                "Wall clock from when a job was queued to its end, in seconds.");
    auto& failures = Counters("certiq_lambda_stability_failures_total",
                              "Damping attempts whose factorisation was not accepted.");
    auto& fallback = Counters("certiq_lambda_fallbacks_total",
                              "Layers rounded to nearest since every damping attempt failed.");
    for (const engine::Method method : Labelled<engine::Method>()) {
      const prometheus::Labels labels = {{"method", LabelOf(method)}};
      const auto with = [&labels](const char* name, const char* value) {
        prometheus::Labels more = labels;
        more[name] = value;
        return more;
      };
      for (const JobState state : Labelled<JobState>()) {
        if (!IsFinal(state)) continue;
        jobs_total[method][state] = &finished.Add(with("outcome", LabelOf(state)));
        job_duration[method][state] =
            &duration.Add(with("outcome", LabelOf(state)), SecondsBuckets());
      }
      for (const engine::Phase phase : kTimedPhases) {
        job_seconds[method][phase] = &seconds.Add(with("phase", LabelOf(phase)), SecondsBuckets());
      }
      for (const engine::StabilityCause cause : Labelled<engine::StabilityCause>()) {
        if (cause == engine::StabilityCause::kNone) continue;
        stability_failures[method][cause] = &failures.Add(with("cause", LabelOf(cause)));
      }
      fallbacks[method] = &fallback.Add(labels);
    }
    lambda_ratio = &Histograms("certiq_lambda_ratio",
                               "Lambda used divided by lambda asked for, of layers that were "
                               "quantized with it.")
                        .Add({}, LambdaRatioBuckets());
    auto& reasons = Counters("certiq_rejected_total",
                             "Layers, jobs, calibrations and streams that were not taken on.");
    for (const Rejection reason : Labelled<Rejection>()) {
      rejected[reason] = &reasons.Add({{"reason", LabelOf(reason)}});
    }
  }

  void BuildPool() {
    queue_depth = &Gauges("certiq_queue_depth", "Jobs that wait for a worker.").Add({});
    queue_limit = &Gauges("certiq_queue_limit",
                          "Places for jobs that upload or wait; beyond, calls are refused.")
                       .Add({});
    workers_busy = &Gauges("certiq_workers_busy", "Workers with something to do.").Add({});
    workers = &Gauges("certiq_workers", "Worker threads.").Add({});
    drain_start = &Gauges("certiq_drain_start_time_seconds",
                          "When the server was told to end, in seconds since the epoch; 0 before.")
                       .Add({});
    drain_limit = &Gauges("certiq_drain_limit_seconds",
                          "What calls and jobs may take to end after that, in seconds.")
                       .Add({});
    budget = &Gauges("certiq_memory_budget_bytes", "Bytes that clients may make the server hold.")
                  .Add({});
    reserved = &Gauges("certiq_memory_reserved_bytes", "Bytes of the budget now promised.").Add({});
  }

  void BuildResults() {
    auto& weights = Counters("certiq_weights_quantized_total", "Weights quantized.");
    auto& errors = Histograms("certiq_relative_error",
                              "Relative error |XW - XQ| / |XW| of layers quantized (a ratio).");
    auto& tightness = Histograms("certiq_bound_tightness",
                                 "Damped error divided by its bound, layers quantized (a ratio).");
    for (const engine::Method method : Labelled<engine::Method>()) {
      for (int bits = kMinBits; bits <= kMaxBits; ++bits) {
        const prometheus::Labels labels = {{"method", LabelOf(method)},
                                           {"bits", std::to_string(bits)}};
        const auto b = static_cast<size_t>(bits - kMinBits);
        weights_quantized[method][b] = &weights.Add(labels);
        relative_error[method][b] = &errors.Add(labels, RelativeErrorBuckets());
        bound_tightness[method][b] = &tightness.Add(labels, TightnessBuckets());
      }
    }
    activation_rows =
        &Counters("certiq_activation_rows_total", "Rows (tokens) of activations folded.").Add({});
    activation_bytes =
        &Counters("certiq_activation_bytes_total", "Bytes of activations folded, as sent.").Add({});
    auto& flops = Counters("certiq_flops_total",
                           "Floating point operations by the formulas' count: tokens N^2 for "
                           "statistics, N^3/3 a factorisation, R N^2 for rounding.");
    flops_statistics = &flops.Add({{"phase", "statistics"}});
    flops_factor = &flops.Add({{"phase", "factor"}});
    flops_round = &flops.Add({{"phase", "round"}});
    auto& cache = Counters("certiq_factor_cache_total",
                           "Factors that jobs of a calibration asked for: kept from before or "
                           "made by another job (hit), or made (miss).");
    factor_hits = &cache.Add({{"result", "hit"}});
    factor_misses = &cache.Add({{"result", "miss"}});
    clipped_weights =
        &Counters("certiq_clipped_weights_total", "Weights that the grid clipped.").Add({});
    dead_features =
        &Counters("certiq_dead_features_total", "Input features whose activations were all zero.")
             .Add({});
  }

  void BuildRpcs() {
    auto& started =
        Counters("grpc_server_started_total", "Total number of RPCs started on the server.");
    auto& handled = Counters("grpc_server_handled_total",
                             "Total number of RPCs completed on the server, regardless of success "
                             "or failure.");
    auto& received = Counters("grpc_server_msg_received_total",
                              "Total number of RPC stream messages received on the server.");
    auto& sent = Counters("grpc_server_msg_sent_total",
                          "Total number of gRPC stream messages sent by the server.");
    auto& seconds = Histograms("grpc_server_handling_seconds",
                               "Response latency in seconds of RPCs handled by the server.");
    for (size_t r = 0; r < kRpcs.size(); ++r) {
      const prometheus::Labels labels = {{"grpc_type", LabelOf(kRpcs[r].shape)},
                                         {"grpc_service", kRpcs[r].service},
                                         {"grpc_method", kRpcs[r].method}};
      rpc_started[r] = &started.Add(labels);
      rpc_received[r] = &received.Add(labels);
      rpc_sent[r] = &sent.Add(labels);
      rpc_seconds[r] = &seconds.Add(labels, SecondsBuckets());
      for (const absl::StatusCode code : Labelled<absl::StatusCode>()) {
        prometheus::Labels with_code = labels;
        with_code["grpc_code"] = LabelOf(code);
        rpc_handled[r][code] = &handled.Add(with_code);
      }
    }
  }
};

namespace {

// The index of a method in kRpcs; kRpcs.size() for a method that is not counted.
size_t Index(const RpcMethod& method) {
  for (size_t r = 0; r < kRpcs.size(); ++r) {
    if (std::strcmp(kRpcs[r].method, method.method) == 0 &&
        std::strcmp(kRpcs[r].service, method.service) == 0) {
      return r;
    }
  }
  return kRpcs.size();
}

}  // namespace

Metrics::Metrics(const Options& options) : families_(std::make_unique<Families>()) {
  families_->Gauges("certiq_build_info", "Always 1; the labels tell what runs.")
      .Add({{"version", options.version}, {"isa", options.isa}})
      .Set(1);
  families_->drain_limit->Set(options.drain_limit);
}

Metrics::~Metrics() = default;

void Metrics::DrainStarted(double unix_seconds) { families_->drain_start->Set(unix_seconds); }

std::string Metrics::Text() const {
  std::ostringstream out;
  prometheus::TextSerializer().Serialize(out, families_->registry.Collect());
  return out.str();
}

void Metrics::JobEntered(JobState state) { families_->jobs[state]->Increment(); }
void Metrics::JobLeft(JobState state) { families_->jobs[state]->Decrement(); }

void Metrics::JobFinished(engine::Method method, JobState outcome, double seconds,
                          const engine::LayerCertificate* certificate) {
  Families& f = *families_;
  if (Counter* const total = f.jobs_total[method][outcome]; total != nullptr) {
    total->Increment();
    f.job_duration[method][outcome]->Observe(seconds);
  }
  if (certificate == nullptr) return;

  const engine::LayerCertificate& c = *certificate;
  f.flops_factor->Increment(c.factor_flops);
  f.flops_round->Increment(c.round_flops);
  f.clipped_weights->Increment(static_cast<double>(c.clipped_weights));
  f.dead_features->Increment(static_cast<double>(c.dead_features));
  if (c.outcome == engine::Outcome::kFellBackToNearest) {
    f.fallbacks[method]->Increment();
  } else if (method != engine::Method::kNearest) {
    // A lambda that was raised from 0 has no ratio.
    if (c.lambda_requested > 0) {
      f.lambda_ratio->Observe(c.lambda_used / c.lambda_requested);
    } else if (c.lambda_used == 0) {
      f.lambda_ratio->Observe(1);
    }
  }
  if (c.spec.bits < kMinBits || c.spec.bits > kMaxBits) return;
  const auto b = static_cast<size_t>(c.spec.bits - kMinBits);
  f.weights_quantized[method][b]->Increment(static_cast<double>(c.rows) *
                                            static_cast<double>(c.features));
  f.relative_error[method][b]->Observe(c.relative_error);
  if (c.l2_bound > 0) {
    f.bound_tightness[method][b]->Observe(std::sqrt(c.damped_squared_error) / c.l2_bound);
  }
}

void Metrics::PhaseTook(engine::Method method, engine::Phase phase, double seconds) {
  Histogram* const histogram = families_->job_seconds[method][phase];
  if (histogram != nullptr) histogram->Observe(seconds);
}

void Metrics::StabilityFailed(engine::Method method, engine::StabilityCause cause) {
  Counter* const failures = families_->stability_failures[method][cause];
  if (failures != nullptr) failures->Increment();
}

void Metrics::ActivationsFolded(int64_t rows, int64_t features, int64_t bytes) {
  const auto n = static_cast<double>(features);
  families_->activation_rows->Increment(static_cast<double>(rows));
  families_->activation_bytes->Increment(static_cast<double>(bytes));
  families_->flops_statistics->Increment(static_cast<double>(rows) * n * n);
}

void Metrics::Rejected(Rejection reason) { families_->rejected[reason]->Increment(); }

void Metrics::FactorAsked(bool shared) {
  (shared ? families_->factor_hits : families_->factor_misses)->Increment();
}

void Metrics::BudgetChanged(int64_t reserved_bytes, int64_t capacity_bytes) {
  families_->reserved->Set(static_cast<double>(reserved_bytes));
  families_->budget->Set(static_cast<double>(capacity_bytes));
}

void Metrics::QueueChanged(int64_t depth, int64_t limit) {
  families_->queue_depth->Set(static_cast<double>(depth));
  families_->queue_limit->Set(static_cast<double>(limit));
}

void Metrics::WorkersChanged(int64_t busy, int64_t workers) {
  families_->workers_busy->Set(static_cast<double>(busy));
  families_->workers->Set(static_cast<double>(workers));
}

void Metrics::CallStarted(const RpcMethod& method) {
  const size_t r = Index(method);
  if (r < kRpcs.size()) families_->rpc_started[r]->Increment();
}

void Metrics::MessageReceived(const RpcMethod& method) {
  const size_t r = Index(method);
  if (r < kRpcs.size()) families_->rpc_received[r]->Increment();
}

void Metrics::MessageSent(const RpcMethod& method) {
  const size_t r = Index(method);
  if (r < kRpcs.size()) families_->rpc_sent[r]->Increment();
}

void Metrics::CallHandled(const RpcMethod& method, absl::StatusCode code, double seconds) {
  const size_t r = Index(method);
  if (r >= kRpcs.size()) return;
  families_->rpc_seconds[r]->Observe(seconds);
  const bool known = LabelOf(code) != nullptr;
  families_->rpc_handled[r][known ? code : absl::StatusCode::kUnknown]->Increment();
}

}  // namespace certiq::server
