// Wall-clock seconds of a scope.

#ifndef CERTIQ_ENGINE_STOPWATCH_H_
#define CERTIQ_ENGINE_STOPWATCH_H_

#include <chrono>

namespace certiq::engine {

// Adds the seconds of its scope to `to`.
class Stopwatch {
 public:
  explicit Stopwatch(double& to) : to_(to), start_(std::chrono::steady_clock::now()) {}
  ~Stopwatch() {
    to_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double& to_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_STOPWATCH_H_
