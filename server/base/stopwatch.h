// Scoped wall-clock timer.

#ifndef CERTIQ_BASE_STOPWATCH_H_
#define CERTIQ_BASE_STOPWATCH_H_

#include <chrono>

namespace certiq::base {

// Adds the seconds of its scope to `to`. With `from`, the total of an enclosing scope, it subtracts
// them there, so that the two totals do not overlap.
class Stopwatch {
 public:
  explicit Stopwatch(double& to) : to_(to), start_(std::chrono::steady_clock::now()) {}
  Stopwatch(double& to, double& from) : Stopwatch(to) { from_ = &from; }
  ~Stopwatch() {
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    to_ += seconds;
    if (from_ != nullptr) *from_ -= seconds;
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double& to_;
  double* from_ = nullptr;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace certiq::base

#endif  // CERTIQ_BASE_STOPWATCH_H_
