// Times each phase of the engine; see README.md for what the names mean.

#include <benchmark/benchmark.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <latch>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "certiq/v1/spec.pb.h"
#include "contract/resolve_spec.h"
#include "engine/gram/gram.h"
#include "engine/linalg/damped_factor.h"
#include "engine/linalg/udu_factor.h"
#include "engine/methods/feedback_sweep.h"
#include "engine/methods/method.h"
#include "engine/quantize_layer.h"
#include "engine/scales/qparams.h"
#include "runtime/worker_pool.h"
#include "tests/bench/layers.h"
#include "tests/bench/one_run_cache.h"
#include "tests/bench/peak.h"

namespace certiq::bench {
namespace {

using engine::RunContext;
using engine::SharedStatistics;
using server::WorkerPool;

constexpr double kDampingShare = 0.01;
constexpr uint64_t kSeed = 1;

// Stops the program where what is to be measured fails: there is no time to report then.
void CheckOk(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "engine_bench: %s\n", status.ToString().c_str());
  std::abort();
}

// Runs on a worker, as jobs do: the pool then has as many threads as it has workers.
void OnWorker(WorkerPool& pool, const std::function<void()>& body) {
  CheckOk(pool.Post({.run =
                         [&body] {
                           body();
                           return absl::OkStatus();
                         },
                     .done = [](const absl::Status& status) { CheckOk(status); }}));
  while (!pool.WaitRunning(std::chrono::steady_clock::now() + std::chrono::hours(1))) {
  }
}

RunContext On(WorkerPool& pool) {
  RunContext context;
  context.executor = &pool;
  return context;
}

enum class Data { kMatched, kMismatched };

// Sums made once a size and kept: they are not what most benchmarks measure.
SharedStatistics Sums(int64_t features, int64_t tokens, Data data, uint64_t seed = kSeed) {
  static std::map<std::tuple<int64_t, int64_t, Data, uint64_t>, SharedStatistics> known;
  SharedStatistics& sums = known[{features, tokens, data, seed}];
  if (sums != nullptr) return sums;
  WorkerPool pool(2, 1);
  const std::vector<std::byte> x = Activations(tokens, features, seed);
  if (data == Data::kMatched) {
    engine::StatisticsAccumulator accumulator(features);
    CheckOk(accumulator.Append({engine::DType::kF16, x.data(), "x"}, 0, tokens, pool));
    sums = std::make_shared<const engine::Statistics>(std::move(accumulator).Finish(pool));
    return sums;
  }
  const std::vector<std::byte> seen = Disturbed(x, seed + 1);
  engine::StatisticsAccumulator accumulator(features, /*mismatched=*/true);
  CheckOk(accumulator.AppendPair({engine::DType::kF16, x.data(), "x"},
                                 {engine::DType::kF16, seen.data(), "x_quantized"}, 0, tokens,
                                 pool));
  sums = std::make_shared<const engine::Statistics>(std::move(accumulator).Finish(pool));
  return sums;
}

engine::ResolvedSpec Spec(engine::Method method) {
  engine::ResolvedSpec spec;
  spec.method = method;
  spec.damping_value = kDampingShare;
  return spec;
}

engine::ResolvedSpec Preset(v1::Quality quality) {
  v1::QuantizationSpec asked;
  asked.set_bits(4);
  asked.set_quality(quality);
  absl::StatusOr<engine::ResolvedSpec> spec = server::ResolveSpec(asked);
  CheckOk(spec.status());
  return *std::move(spec);
}

void SetRate(benchmark::State& state, double flops, double peak) {
  const auto runs = static_cast<double>(state.iterations());
  state.counters["gflops"] = benchmark::Counter(flops * runs * 1e-9, benchmark::Counter::kIsRate);
  state.counters["peak_percent"] =
      benchmark::Counter(flops * runs * 1e-7 / peak, benchmark::Counter::kIsRate);
}

void BenchPeak(benchmark::State& state, double (*peak)(int), int workers) {
  for (auto _ : state) benchmark::DoNotOptimize(peak(workers));
  state.counters["gflops"] = peak(workers);
}

void BenchStatistics(benchmark::State& state, int64_t features, int64_t tokens, int workers) {
  const std::vector<std::byte> x = Activations(tokens, features, kSeed);
  const double peak = PeakFloat(workers);
  WorkerPool pool(workers, 1);
  OnWorker(pool, [&] {
    engine::StatisticsAccumulator accumulator(features);
    for (auto _ : state) {
      CheckOk(accumulator.Append({engine::DType::kF16, x.data(), "x"}, 0, tokens, pool));
      accumulator.Flush(pool);
    }
  });
  const auto n = static_cast<double>(features);
  SetRate(state, n * n * static_cast<double>(tokens), peak);
}

void BenchFactor(benchmark::State& state, int64_t features, int64_t tokens, int workers) {
  const SharedStatistics sums = Sums(features, tokens, Data::kMatched);
  const std::vector<bool> dead(static_cast<size_t>(features));
  const double lambda = kDampingShare * engine::MeanDiagonal(sums->gram);
  const double peak = PeakDouble(workers);
  WorkerPool pool(workers, 1);
  OnWorker(pool, [&] {
    for (auto _ : state) {
      const auto attempt =
          engine::FactorDamped(sums->gram, dead, lambda, engine::FactorUse::kCertify, On(pool));
      CheckOk(attempt.status());
      benchmark::DoNotOptimize(attempt->factor.condition);
    }
  });
  const auto n = static_cast<double>(features);
  SetRate(state, n * n * n / 3, peak);
}

void BenchRounding(benchmark::State& state, const Shape& shape, int64_t tokens, int workers) {
  const SharedStatistics sums = Sums(shape.features, tokens, Data::kMatched);
  const std::vector<bool> dead(static_cast<size_t>(shape.features));
  const engine::ResolvedSpec spec = Spec(engine::Method::kOptq);
  const double lambda = kDampingShare * engine::MeanDiagonal(sums->gram);
  const engine::StripMatrix weights = Weights(shape, kSeed);
  const double peak = PeakFloat(workers);
  WorkerPool pool(workers, 1);
  OnWorker(pool, [&] {
    const RunContext context = On(pool);
    const auto attempt =
        engine::FactorDamped(sums->gram, dead, lambda, engine::FactorUse::kCertify, context);
    CheckOk(attempt.status());
    const engine::FeedbackColumns u(attempt->factor, nullptr, pool);
    engine::Grid grid = engine::MakeGrid(spec, shape.rows, shape.features, {});
    engine::FillQuantParams(spec, weights, context, grid);
    engine::SweepRules rules;
    rules.first_dynamic_group = grid.groups;
    for (auto _ : state) {
      state.PauseTiming();
      engine::StripMatrix targets = weights;
      engine::RoundedLayer rounded;
      rounded.grid = grid;
      state.ResumeTiming();
      CheckOk(engine::FeedbackSweep(spec, rules, u, attempt->factor.d, targets, rounded, context));
      benchmark::DoNotOptimize(rounded.codes.data());
    }
  });
  const auto n = static_cast<double>(shape.features);
  SetRate(state, n * n * static_cast<double>(shape.rows), peak);
}

// A rule's search over all rows; the rule that needs them gets |X~_j|^2 for weights.
void BenchScales(benchmark::State& state, const Shape& shape, int64_t tokens,
                 const engine::ResolvedSpec& spec, int workers) {
  const SharedStatistics sums = Sums(shape.features, tokens, Data::kMatched);
  const engine::StripMatrix weights = Weights(shape, kSeed);
  engine::ScaleMetric metric;
  for (int64_t j = 0; j < shape.features; ++j) metric.diagonal.push_back(sums->gram.at(j, j));
  WorkerPool pool(workers, 1);
  OnWorker(pool, [&] {
    const RunContext context = On(pool);
    for (auto _ : state) {
      engine::Grid grid = engine::MakeGrid(spec, shape.rows, shape.features, {});
      engine::FillQuantParams(spec, weights, context, grid, metric);
      benchmark::DoNotOptimize(grid.scale.data());
    }
  });
}

// Milliseconds of each phase, means over the runs.
void AddSeconds(const engine::LayerCertificate& certificate, benchmark::State& state) {
  const auto add = [&state](const char* name, double seconds) {
    benchmark::Counter& counter = state.counters[name];
    counter = benchmark::Counter(counter.value + 1e3 * seconds, benchmark::Counter::kAvgIterations);
  };
  add("factor_ms", certificate.seconds.factor);
  add("round_ms", certificate.seconds.round);
  add("certify_ms", certificate.seconds.certify);
  add("reference_ms", certificate.seconds.reference);
  add("pack_ms", certificate.seconds.pack);
}

struct Job {
  engine::ResolvedSpec spec;
  SharedStatistics sums;
  SharedStatistics held_out = nullptr;
  // Layers that share the sums.
  int layers = 1;
};

void BenchJob(benchmark::State& state, const Shape& shape, const std::function<Job()>& make,
              int workers) {
  const Job job = make();
  const engine::StripMatrix weights = Weights(shape, kSeed);
  WorkerPool pool(workers, 1);
  OnWorker(pool, [&] {
    const RunContext context = On(pool);
    for (auto _ : state) {
      OneRunCache factors;
      for (int layer = 0; layer < job.layers; ++layer) {
        state.PauseTiming();
        engine::LayerProblem problem{job.spec, weights, job.sums, job.held_out,
                                     job.layers > 1 ? &factors : nullptr};
        state.ResumeTiming();
        const auto result = engine::QuantizeLayer(std::move(problem), context);
        CheckOk(result.status());
        state.PauseTiming();
        AddSeconds(result->certificate, state);
        state.ResumeTiming();
      }
    }
  });
}

// Many small layers, each a job of its own, as a server has them.
void BenchMany(benchmark::State& state, const Shape& shape, int64_t tokens, int workers) {
  constexpr int kJobs = 16;
  const SharedStatistics sums = Sums(shape.features, tokens, Data::kMatched);
  const engine::ResolvedSpec spec = Spec(engine::Method::kOptq);
  const engine::StripMatrix weights = Weights(shape, kSeed);
  WorkerPool pool(workers, kJobs);
  for (auto _ : state) {
    std::latch ended(kJobs);
    for (int i = 0; i < kJobs; ++i) {
      absl::StatusOr<WorkerPool::Slot> slot = pool.Admit();
      CheckOk(slot.status());
      CheckOk(
          pool.Enqueue(*std::move(slot),
                       {.cancellation = std::make_shared<engine::Cancellation>(),
                        .run =
                            [&] {
                              engine::LayerProblem problem{spec, weights, sums, nullptr, nullptr};
                              return engine::QuantizeLayer(std::move(problem), On(pool)).status();
                            },
                        .done =
                            [&ended](const absl::Status& status) {
                              CheckOk(status);
                              ended.count_down();
                            }})
              .status());
    }
    ended.wait();
  }
  state.counters["layers"] = benchmark::Counter(static_cast<double>(kJobs * state.iterations()),
                                                benchmark::Counter::kIsRate);
}

// For CLI11: what is wrong with a shape, or nothing.
std::string ShapeFault(const std::string& text) {
  return ParseShape(text).has_value() ? "" : absl::StrCat("expected ROWSxFEATURES, got ", text);
}

void Register(const std::string& name, std::function<void(benchmark::State&)> body) {
  benchmark::RegisterBenchmark(name.c_str(), std::move(body))
      ->Unit(benchmark::kMillisecond)
      ->UseRealTime()
      ->MeasureProcessCPUTime();
}

void RegisterShape(const Shape& shape, int64_t tokens, int workers) {
  const std::string tail = absl::StrCat("/workers:", workers);
  const std::string features = absl::StrCat("/features:", shape.features);
  const std::string layer = absl::StrCat("/rows:", shape.rows, features);
  const int64_t n = shape.features;
  Register(absl::StrCat("statistics", features, "/tokens:", tokens, tail),
           [=](benchmark::State& state) { BenchStatistics(state, n, tokens, workers); });
  Register(absl::StrCat("factor", features, tail),
           [=](benchmark::State& state) { BenchFactor(state, n, tokens, workers); });
  Register(absl::StrCat("rounding", layer, tail),
           [=](benchmark::State& state) { BenchRounding(state, shape, tokens, workers); });
  const auto scales = [&](const char* name, engine::ScaleRule rule, bool symmetric,
                          int64_t group_size) {
    engine::ResolvedSpec spec = Spec(engine::Method::kOptq);
    spec.scale = rule;
    spec.symmetric = symmetric;
    spec.group_size = group_size;
    Register(absl::StrCat(name, layer, tail),
             [=](benchmark::State& state) { BenchScales(state, shape, tokens, spec, workers); });
  };
  scales("scales_mse", engine::ScaleRule::kMse, true, 0);
  scales("scales_mse_asymmetric", engine::ScaleRule::kMse, false, 0);
  scales("scales_mse_asymmetric_groups", engine::ScaleRule::kMse, false, 64);
  scales("scales_compensated", engine::ScaleRule::kCompensated, true, 0);
  scales("scales_compensated_asymmetric", engine::ScaleRule::kCompensated, false, 0);
  scales("scales_compensated_groups", engine::ScaleRule::kCompensated, true, 64);
  scales("scales_compensated_asymmetric_groups", engine::ScaleRule::kCompensated, false, 64);
  const auto job = [&](const char* name, const std::function<Job()>& make) {
    Register(absl::StrCat(name, layer, tail),
             [=](benchmark::State& state) { BenchJob(state, shape, make, workers); });
  };
  job("quantize", [=] {
    return Job{Spec(engine::Method::kOptq), Sums(n, tokens, Data::kMatched)};
  });
  job("qronos", [=] {
    return Job{Spec(engine::Method::kQronos), Sums(n, tokens, Data::kMismatched)};
  });
  constexpr int64_t kSmall = 1024;
  if (n <= kSmall && shape.rows <= kSmall) {
    Register(absl::StrCat("many", layer, tail),
             [=](benchmark::State& state) { BenchMany(state, shape, tokens, workers); });
  }
  job("shared", [=] {
    return Job{
        .spec = Spec(engine::Method::kOptq), .sums = Sums(n, tokens, Data::kMatched), .layers = 3};
  });
  job("quantize_held_out", [=] {
    return Job{Spec(engine::Method::kOptq), Sums(n, tokens, Data::kMatched),
               Sums(n, tokens / 8, Data::kMatched, kSeed + 7)};
  });
  job("ladder", [=] {
    Job search{Spec(engine::Method::kOptq), Sums(n, tokens, Data::kMatched),
               Sums(n, tokens / 8, Data::kMatched, kSeed + 7)};
    search.spec.damping_rule = engine::DampingRule::kHeldOut;
    return search;
  });
  for (const auto& [name, quality] :
       {std::pair{"fast", v1::QUALITY_FAST}, std::pair{"balanced", v1::QUALITY_BALANCED},
        std::pair{"best", v1::QUALITY_BEST}}) {
    job(name, [=, quality = quality] {
      return Job{Preset(quality), Sums(n, tokens, Data::kMatched),
                 Sums(n, tokens / 8, Data::kMatched, kSeed + 7)};
    });
  }
}

int Main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  CLI::App app("Times each phase of certiq's engine");
  std::vector<std::string> shapes{"4096x4096"};
  std::vector<int> workers{1, 2};
  int64_t tokens = 4096;
  app.add_option("--shapes", shapes, "ROWSxFEATURES, comma-separated")
      ->delimiter(',')
      ->check(ShapeFault);
  app.add_option("--workers", workers, "threads, comma-separated")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  app.add_option("--tokens", tokens, "calibration tokens")->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);

  benchmark::AddCustomContext("isa", engine::EngineIsa());
  for (const int count : workers) {
    Register(absl::StrCat("peak_f32/workers:", count),
             [=](benchmark::State& state) { BenchPeak(state, PeakFloat, count); });
    Register(absl::StrCat("peak_f64/workers:", count),
             [=](benchmark::State& state) { BenchPeak(state, PeakDouble, count); });
    for (const std::string& text : shapes) RegisterShape(*ParseShape(text), tokens, count);
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace
}  // namespace certiq::bench

int main(int argc, char** argv) {
  try {
    return certiq::bench::Main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "engine_bench: %s\n", error.what());
    return 1;
  }
}
