#include "tests/bench/peak.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "engine/quantize_layer.h"
#include "tests/bench/peak_kernel.h"

namespace certiq::bench {
namespace {

using Kernel = double (*)(int64_t);

Kernel Pick(Kernel v2, Kernel v3, Kernel v4) {
  const std::string isa = engine::EngineIsa();
  if (isa == "x86-64-v4") return v4;
  return isa == "x86-64-v3" ? v3 : v2;
}

double Measure(Kernel kernel, int threads) {
  constexpr int kRuns = 9;
  constexpr int64_t kSteps = 4'000'000;
  double best = 0;
  for (int run = 0; run < kRuns; ++run) {
    std::barrier start(threads);
    std::vector<double> rates(static_cast<size_t>(threads));
    std::vector<std::thread> workers;
    workers.reserve(rates.size());
    for (double& rate : rates) {
      workers.emplace_back([&start, &rate, kernel] {
        start.arrive_and_wait();
        const auto from = std::chrono::steady_clock::now();
        const double flops = kernel(kSteps);
        rate =
            flops / std::chrono::duration<double>(std::chrono::steady_clock::now() - from).count();
      });
    }
    double sum = 0;
    for (size_t i = 0; i < workers.size(); ++i) {
      workers[i].join();
      sum += rates[i] * 1e-9;
    }
    best = std::max(best, sum);
  }
  return best;
}

double Remembered(std::map<int, double>& known, Kernel kernel, int threads) {
  const auto [at, fresh] = known.try_emplace(threads, 0.0);
  if (fresh) at->second = Measure(kernel, threads);
  return at->second;
}

}  // namespace

double MultiplyAddFloat(int64_t steps) {
  return Pick(v2::MultiplyAddFloat, v3::MultiplyAddFloat, v4::MultiplyAddFloat)(steps);
}

double MultiplyAddDouble(int64_t steps) {
  return Pick(v2::MultiplyAddDouble, v3::MultiplyAddDouble, v4::MultiplyAddDouble)(steps);
}

double PeakFloat(int threads) {
  static std::map<int, double> known;
  return Remembered(known, MultiplyAddFloat, threads);
}

double PeakDouble(int threads) {
  static std::map<int, double> known;
  return Remembered(known, MultiplyAddDouble, threads);
}

}  // namespace certiq::bench
