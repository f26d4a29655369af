#include "backend.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "base/clock.h"
#include "base/id.h"
#include "base/status_macros.h"

namespace certiq::server {

Backend::Backend(const Options& options, Storage storage, std::string replica)
    : storage_(std::move(storage)),
      memory_(options.memory_bytes, *options.observer),
      disk_(options.disk_bytes),
      pool_(options.workers, options.queue_limit, *options.observer),
      cache_(pool_, memory_, options.cache_bytes),
      quotas_(memory_, disk_),
      environment_{pool_, storage_, cache_, quotas_, *options.observer, options.job_log},
      calibrations_(environment_, options.commit_interval),
      jobs_(environment_, calibrations_, std::move(replica)),
      periodic_task_(
          [this] {
            calibrations_.Tick(std::chrono::steady_clock::now());
            jobs_.Tick();
          },
          options.tick_interval,
          // What was given back may be what a job waits for.
          [this] { pool_.Poke(); }) {
  memory_.SetReclaimer([this](int64_t bytes) { cache_.Reclaim(bytes); });
  memory_.SetReleased([this] { periodic_task_.Wake(); });
}

absl::StatusOr<std::unique_ptr<Backend>> Backend::Start(const Options& options, Storage storage) {
  const std::string replica = base::NewId("replica-");
  std::unique_ptr<Backend> backend(new Backend(options, std::move(storage), replica));
  std::set<std::string> named;
  const Storage& opened = backend->storage_;
  RETURN_IF_ERROR(opened.catalog->Register(
      replica, base::Now(),
      [&](const CalibrationRecord& record) {
        named.insert(record.sums().name());
        backend->calibrations_.Found(record);
      },
      [&](const JobRecord& record) {
        named.insert(record.weights().name());
        named.insert(record.result().blob().name());
        backend->jobs_.Found(record);
      }));
  RETURN_IF_ERROR(opened.blobs->RemoveAllBut(named));
  backend->jobs_.Start();
  backend->periodic_task_.Start();
  return backend;
}

Backend::~Backend() {
  pool_.Shutdown();
  periodic_task_.Stop();
  // Nothing runs any more; what goes now gives its bytes back.
  memory_.SetReleased(nullptr);
}

void Backend::StopStarting() {
  pool_.StopAdmitting();
  jobs_.StopStarting();
}

bool Backend::WaitRunning(std::chrono::steady_clock::time_point deadline) {
  const bool ended = pool_.WaitRunning(deadline);
  // What streams brought last.
  calibrations_.CommitAll();
  return pool_.WaitRunning(
             std::max(deadline, std::chrono::steady_clock::now() + std::chrono::seconds(5))) &&
         ended;
}

}  // namespace certiq::server
