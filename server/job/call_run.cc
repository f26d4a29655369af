#include "job/call_run.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <utility>

#include "base/status_macros.h"
#include "job/job_report.h"

namespace certiq::server {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int64_t BytesOf(const engine::QuantizedLayer& layer) {
  // Two doubles a row here, and two again as messages.
  int64_t bytes = 32 * layer.certificate.rows;
  for (const engine::ResultTensor& tensor : layer.tensors) {
    bytes += static_cast<int64_t>(tensor.bytes.size());
  }
  return bytes;
}

// What the run holds; its steps share it.
struct State {
  State(const Environment& environment, CalibrationDesk& desk, CallRunCallbacks call)
      : env(environment), calibrations(desk), callbacks(std::move(call)) {}

  absl::StatusOr<RunInput> Load() {
    env.observer.JobLeft(state);
    state = v1::JOB_STATE_RUNNING;
    env.observer.JobEntered(state);
    input->facts.queue_seconds = SecondsSince(queued_at);
    env.observer.PhaseTook(spec.method, engine::Phase::kQueue, input->facts.queue_seconds);
    if (calibration) {
      RETURN_IF_ERROR(LoadCalibration(calibrations, calibration.record(), *input));
    }
    RunInput loaded = *std::move(input);
    input.reset();
    return loaded;
  }

  absl::Status Keep(engine::QuantizedLayer layer, const CertificateFacts& facts) {
    const int64_t bytes = BytesOf(layer);
    memory.ShrinkTo(bytes + 2 * std::min(kFrameBytes, bytes));
    certificate = layer.certificate;
    ResultRecord record = DescribeResult(layer);
    CallResult kept;
    kept.reader = std::make_unique<ResultReader>(std::move(record),
                                                 MakeResultBlob(std::move(layer), facts), 0);
    result = std::move(kept);
    return absl::OkStatus();
  }

  void Done(const absl::Status& status) {
    // What was held goes before anybody hears that the run ended.
    input.reset();
    calibration = CalibrationDesk::Pin();
    permit = CountQuota::Permit();
    env.observer.JobLeft(state);
    ReportFinished(spec, status, SecondsSince(queued_at), status.ok() ? &*certificate : nullptr,
                   env.observer);
    if (!status.ok()) {
      memory.Release();
      callbacks.done(status);
      return;
    }
    result->memory = std::move(memory);
    callbacks.done(*std::move(result));
  }

  const Environment env;
  CalibrationDesk& calibrations;
  const CallRunCallbacks callbacks;
  engine::ResolvedSpec spec;
  const Clock::time_point queued_at = Clock::now();
  JobState state = v1::JOB_STATE_QUEUED;
  CountQuota::Permit permit;
  CalibrationDesk::Pin calibration;
  // Declared before what it pays for.
  ByteBudget::Reservation memory;
  std::optional<RunInput> input;
  std::optional<engine::LayerCertificate> certificate;
  std::optional<CallResult> result;
};

}  // namespace

void StartCallRun(const Environment& environment, CalibrationDesk& calibrations, Upload& upload,
                  CallRunCallbacks callbacks,
                  const std::function<void(const std::shared_ptr<Run>&)>& started) {
  const auto state = std::make_shared<State>(environment, calibrations, std::move(callbacks));
  Admission& admission = upload.admission();
  state->spec = upload.request().spec;
  state->permit = std::move(admission.permit);
  state->memory = std::move(admission.memory);
  RunInput& input = state->input.emplace();
  input.facts = upload.facts();
  input.problem.spec = state->spec;
  input.problem.weights = upload.TakeWeights();
  if (upload.request().activations.has_value()) {
    SplitSums sums = upload.TakeSums();
    input.problem.statistics = std::move(sums.fit);
    input.problem.held_out = std::move(sums.held_out);
  }
  // No further messages come, and the staging is gone.
  state->memory.ShrinkTo(EngineBytes(upload.request(), admission.calibration));
  state->calibration = std::move(admission.calibration);
  environment.observer.JobEntered(state->state);
  const auto run = std::make_shared<Run>(
      environment.pool,
      Run::Steps{.load = [state] { return state->Load(); },
                 .keep =
                     [state](engine::QuantizedLayer layer, const CertificateFacts& facts) {
                       return state->Keep(std::move(layer), facts);
                     },
                 .progress = state->callbacks.progress,
                 .done = [state](const absl::Status& status) { state->Done(status); }});
  started(run);
  run->Start(std::move(admission.slot));
}

}  // namespace certiq::server
