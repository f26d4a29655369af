// Events of stored jobs: who watches a job, and what observers hear.

#ifndef CERTIQ_JOB_JOB_EVENTS_H_
#define CERTIQ_JOB_JOB_EVENTS_H_

#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "base/listener.h"
#include "base/mutex.h"
#include "observability/observer.h"
#include "store/catalog.h"

namespace certiq::server {

// Thread-safe.
class JobEvents {
 public:
  explicit JobEvents(Observer& observer) : observer_(observer) {}

  // `listener` is told of every change of the job until Unwatch.
  void Watch(const std::string& id, const std::shared_ptr<base::Listener>& listener) {
    const base::MutexLock lock(mu_);
    listeners_[id].insert(listener);
  }
  void Unwatch(const std::string& id, const std::shared_ptr<base::Listener>& listener) {
    const base::MutexLock lock(mu_);
    const auto found = listeners_.find(id);
    if (found == listeners_.end()) return;
    found->second.erase(listener);
    if (found->second.empty()) listeners_.erase(found);
  }

  // The job changed in the catalog.
  void Changed(const JobChange& change) {
    if (change.changed) {
      if (change.before != v1::JOB_STATE_UNSPECIFIED) observer_.JobLeft(change.before);
      observer_.JobEntered(change.job.state());
    }
    Notify(change.job.id());
  }
  // Something beside its record changed: its progress.
  void Notify(const std::string& id) {
    std::vector<std::shared_ptr<base::Listener>> told;
    {
      const base::MutexLock lock(mu_);
      const auto found = listeners_.find(id);
      if (found == listeners_.end()) return;
      told.assign(found->second.begin(), found->second.end());
    }
    for (const auto& listener : told) listener->Notify();
  }

 private:
  Observer& observer_;
  base::Mutex mu_;
  std::map<std::string, std::set<std::shared_ptr<base::Listener>>> listeners_ ABSL_GUARDED_BY(mu_);
};

}  // namespace certiq::server

#endif  // CERTIQ_JOB_JOB_EVENTS_H_
