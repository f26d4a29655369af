#include "backend.h"

#include <algorithm>
#include <utility>

namespace certiq::server {

Backend::Backend(const Options& options, std::unique_ptr<Store> store,
                 std::unique_ptr<const Codec> codec)
    : store_(std::move(store)),
      codec_(std::move(codec)),
      memory_(options.memory_bytes, *options.observer),
      disk_(options.disk_bytes),
      pool_(options.workers, options.queue_limit, *options.observer),
      cache_(pool_, memory_, options.cache_bytes),
      accounts_(memory_, disk_),
      environment_{pool_, *store_, cache_, accounts_, *options.observer, options.job_log},
      calibrations_(environment_, options.commit_interval),
      manager_(environment_, calibrations_, *codec_),
      housekeeper_(
          [this] {
            calibrations_.Tick(std::chrono::steady_clock::now());
            manager_.Tick();
          },
          options.tick_interval,
          // What was given back may be what a job waits for.
          [this] { pool_.Poke(); }) {
  memory_.SetReclaimer([this](int64_t bytes) { cache_.Reclaim(bytes); });
  memory_.SetReleased([this] { housekeeper_.Wake(); });
}

absl::StatusOr<std::unique_ptr<Backend>> Backend::Start(const Options& options,
                                                        std::unique_ptr<Store> store,
                                                        std::unique_ptr<const Codec> codec) {
  absl::StatusOr<StoredState> state = store->Load();
  if (!state.ok()) return state.status();
  std::unique_ptr<Backend> backend(new Backend(options, std::move(store), std::move(codec)));
  backend->calibrations_.Restore(std::move(state->calibrations));
  backend->manager_.Restore(std::move(state->jobs));
  backend->housekeeper_.Start();
  return backend;
}

Backend::~Backend() {
  pool_.Shutdown();
  housekeeper_.Stop();
  // Nothing runs any more; what goes now gives its bytes back.
  memory_.SetReleased(nullptr);
}

bool Backend::WaitRunning(std::chrono::steady_clock::time_point deadline) {
  bool ended = pool_.WaitRunning(deadline);
  // What streams brought last.
  calibrations_.CommitAll();
  return pool_.WaitRunning(
             std::max(deadline, std::chrono::steady_clock::now() + std::chrono::seconds(5))) &&
         ended;
}

}  // namespace certiq::server
