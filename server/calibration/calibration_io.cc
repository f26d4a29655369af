// The sums of a calibration: loaded, written, finalized, shared.

#include <algorithm>
#include <bit>
#include <functional>
#include <new>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/sha256.h"
#include "base/status.h"
#include "calibration/calibration.h"
#include "calibration/gram_file.h"

namespace certiq::server {
namespace {

using Clock = std::chrono::steady_clock;
using base::PreconditionError;

// Writing sums takes at most this share of the time between two writes.
constexpr int kCommitShare = 10;

// Factors of one calibration's sums, in the cache that all share.
class CalibrationFactors final : public engine::FactorCache {
 public:
  CalibrationFactors(const Environment& environment, std::string prefix, int64_t features)
      : env_(environment), prefix_(std::move(prefix)), features_(features) {}

  absl::StatusOr<engine::SharedFactor> Get(
      const engine::FactorKey& key,
      const std::function<absl::StatusOr<engine::DampedFactor>()>& make) override {
    const auto made = [&]() -> absl::StatusOr<SharedCache::Value> {
      absl::StatusOr<engine::DampedFactor> factor = make();
      if (!factor.ok()) return factor.status();
      return SharedCache::Value(std::make_shared<const engine::DampedFactor>(*std::move(factor)));
    };
    const int64_t bytes = engine::UpperPanels<double>::ElementsFor(features_) * 8 + features_ * 8;
    const auto found = env_.cache.Get(
        absl::StrCat(prefix_, static_cast<int>(key.order), "/", key.with_held_out, "/",
                     absl::Hex(std::bit_cast<uint64_t>(key.lambda)), "/", static_cast<int>(key.use),
                     "/", key.max_attempts, "/", absl::Hex(std::bit_cast<uint64_t>(key.growth))),
        bytes, made);
    if (!found.ok()) return found.status();
    env_.observer.FactorAsked(found->shared);
    return std::static_pointer_cast<const engine::DampedFactor>(found->value);
  }

 private:
  const Environment env_;
  const std::string prefix_;
  const int64_t features_;
};

}  // namespace

absl::Status Calibration::Load() {
  if (fit_.has_value()) return absl::OkStatus();
  BlobRef blob;
  int64_t tokens = 0;
  int64_t held_out_tokens = 0;
  {
    const std::lock_guard lock(mu_);
    blob = durable_.sums;
    tokens = durable_.tokens;
    held_out_tokens = durable_.held_out_tokens;
  }
  if (memory_.bytes() == 0) {
    absl::StatusOr<ByteBudget::Reservation> reservation =
        env_.accounts.Of(tenant_).memory.TryReserve(MemoryBytes(durable_),
                                                    "loading this calibration");
    if (!reservation.ok()) return reservation.status();
    memory_ = *std::move(reservation);
  }
  std::optional<engine::StatisticsAccumulator> fit;
  std::optional<engine::StatisticsAccumulator> held_out;
  if (blob.empty()) {
    fit.emplace(features_, mismatched_);
    if (holds_out_) held_out.emplace(features_, mismatched_);
  } else {
    const auto reader = env_.store.OpenBlob(blob);
    if (!reader.ok()) return reader.status();
    auto sums = ReadStatistics(**reader, 0, features_, mismatched_);
    if (!sums.ok()) return sums.status();
    sums->tokens = tokens;
    fit.emplace(*std::move(sums));
    if (holds_out_) {
      sums = ReadStatistics(**reader, StatisticsBlobBytes(features_, mismatched_), features_,
                            mismatched_);
      if (!sums.ok()) return sums.status();
      sums->tokens = held_out_tokens;
      held_out.emplace(*std::move(sums));
    }
  }
  fit_ = std::move(fit);
  held_out_ = std::move(held_out);
  return absl::OkStatus();
}

void Calibration::Lose() {
  fit_.reset();
  held_out_.reset();
  std::vector<std::shared_ptr<LiveStream>> told;
  {
    const std::lock_guard lock(mu_);
    told = EndLive(absl::UnavailableError(
        "the sums in memory were lost: open the stream again and go on from what is durable"));
    lost_ = !env_.store.durable();
    dirty_ = false;
    now_ = durable_;
    now_.streams.clear();
    streams_.clear();
    for (const StreamRecord& stream : durable_.streams) {
      streams_[stream.id] = {stream, stream.sequence, nullptr};
    }
  }
  for (const auto& live : told) live->changed.Notify();
}

absl::StatusOr<BlobRef> Calibration::WriteSums(std::string& sha256) {
  base::Sha256 digest;
  std::unique_ptr<BlobWriter> writer;
  if (env_.store.durable()) {
    auto created = env_.store.CreateBlob();
    if (!created.ok()) return created.status();
    writer = *std::move(created);
  }
  const ByteSink sink = [&](std::span<const std::byte> bytes) {
    digest.Update({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    return writer == nullptr ? absl::OkStatus() : writer->Append(bytes);
  };
  absl::Status written = WriteStatistics(fit_->Flush(env_.pool), sink);
  if (written.ok() && holds_out_) written = WriteStatistics(held_out_->Flush(env_.pool), sink);
  if (!written.ok()) return written;
  sha256 = digest.Finish();
  if (writer == nullptr) return BlobRef();
  return writer->Commit();
}

absl::Status Calibration::Write(CalibrationRecord next) {
  const Clock::time_point start = Clock::now();
  std::string sha256;
  absl::StatusOr<BlobRef> blob = WriteSums(sha256);
  if (!blob.ok()) return blob.status();
  next.sums = *blob;
  if (next.finalize_time != 0) next.sums_sha256 = sha256;
  if (absl::Status put = env_.store.PutCalibration(next); !put.ok()) {
    if (!blob->empty()) env_.store.DeleteBlob(*blob);
    return put;
  }
  BlobRef older;
  std::vector<std::shared_ptr<LiveStream>> told;
  {
    const std::lock_guard lock(mu_);
    older = durable_.sums;
    durable_ = std::move(next);
    now_ = durable_;
    now_.streams.clear();
    dirty_ = false;
    for (const StreamRecord& record : durable_.streams) {
      Stream& stream = streams_[record.id];
      stream.durable = record.sequence;
      if (stream.live != nullptr) told.push_back(stream.live);
    }
    committed_at_ = Clock::now();
    commit_took_ = committed_at_ - start;
  }
  if (!older.empty()) env_.store.DeleteBlob(older);
  for (const auto& live : told) live->changed.Notify();
  return absl::OkStatus();
}

absl::Status Calibration::Commit() {
  CalibrationRecord next;
  {
    const std::lock_guard lock(mu_);
    commit_posted_ = false;
    if (absl::Status usable = Usable(); !usable.ok()) return usable;
    if (!dirty_) return absl::OkStatus();
    next = now_;
    for (const auto& [id, stream] : streams_) {
      if (stream.now.sequence > 0) next.streams.push_back(stream.now);
    }
  }
  return Write(std::move(next));
}

void Calibration::CommitIfDue(Clock::time_point now, std::chrono::milliseconds interval) {
  {
    const std::lock_guard lock(mu_);
    const auto pause = std::max<Clock::duration>(interval, kCommitShare * commit_took_);
    if (!dirty_ || commit_posted_ || now < committed_at_ + pause) return;
    commit_posted_ = true;
  }
  const std::shared_ptr<Calibration> self = shared_from_this();
  // What fails here fails again, and is told, when the stream ends.
  static_cast<void>(strand_->Post({.run = [self] { return self->Commit(); },
                                   .done =
                                       [self](const absl::Status&) {
                                         const std::lock_guard lock(self->mu_);
                                         self->commit_posted_ = false;
                                         self->committed_at_ = Clock::now();
                                       }}));
}

absl::StatusOr<Snapshot> Calibration::Export(bool held_out) {
  bool finalized = false;
  {
    const std::lock_guard lock(mu_);
    if (absl::Status usable = Usable(); !usable.ok()) return usable;
    finalized = now_.finalize_time != 0;
  }
  Snapshot snapshot;
  if (finalized) {
    const absl::StatusOr<CalibrationSums> sums = Sums();
    if (!sums.ok()) return sums.status();
    snapshot.sums = held_out ? sums->held_out : sums->fit;
    return snapshot;
  }
  if (absl::Status loaded = Load(); !loaded.ok()) return loaded;
  if (held_out && !holds_out_) return snapshot;
  auto reservation = env_.accounts.Of(tenant_).memory.TryReserve(
      engine::StatisticsAccumulator::BytesFor(features_, mismatched_), "this export");
  if (!reservation.ok()) return reservation.status();
  snapshot.reservation = *std::move(reservation);
  snapshot.sums =
      std::make_shared<const engine::Statistics>((held_out ? *held_out_ : *fit_).Flush(env_.pool));
  return snapshot;
}

absl::Status Calibration::Finalize(std::optional<int64_t> expected_tokens,
                                   const std::vector<std::string>& expected_streams) {
  CalibrationRecord next;
  {
    const std::lock_guard lock(mu_);
    if (absl::Status usable = Usable(); !usable.ok()) return usable;
    const int64_t tokens = now_.tokens + now_.held_out_tokens;
    if (expected_tokens.has_value() && *expected_tokens != tokens) {
      return PreconditionError("TOKENS", "expected_tokens",
                               absl::StrCat("expected ", *expected_tokens, " tokens, there are ",
                                            tokens, ", held-out ones included"));
    }
    for (const std::string& id : expected_streams) {
      const auto found = streams_.find(id);
      if (found == streams_.end() || found->second.now.sequence == 0) {
        return PreconditionError("STREAM", id, absl::StrCat("stream ", id, " has sent nothing"));
      }
      if (found->second.live != nullptr) {
        return PreconditionError(
            "STREAM", id, absl::StrCat("stream ", id, " has an open call: it may send more"));
      }
    }
    if (now_.finalize_time != 0) return absl::OkStatus();
    if (now_.tokens == 0) {
      return PreconditionError("TOKENS", "calibration_id",
                               "the calibration has no tokens to fit layers to");
    }
    next = now_;
    for (const auto& [id, stream] : streams_) {
      if (stream.now.sequence > 0) next.streams.push_back(stream.now);
    }
  }
  if (absl::Status loaded = Load(); !loaded.ok()) return loaded;
  next.finalize_time = next.update_time = base::Now();
  if (absl::Status written = Write(std::move(next)); !written.ok()) return written;

  const auto sums = std::make_shared<CalibrationSums>();
  sums->fit = std::make_shared<const engine::Statistics>(std::move(*fit_).Finish(env_.pool));
  if (holds_out_) {
    sums->held_out =
        std::make_shared<const engine::Statistics>(std::move(*held_out_).Finish(env_.pool));
  }
  fit_.reset();
  held_out_.reset();
  std::vector<std::shared_ptr<LiveStream>> told;
  {
    const std::lock_guard lock(mu_);
    sums->sha256 = durable_.sums_sha256;
    told = EndLive(IsFinalized());
    if (!env_.store.durable()) kept_ = sums;
  }
  for (const auto& live : told) live->changed.Notify();
  if (!env_.store.durable()) return absl::OkStatus();
  // The first job will want them; they are in the store, so they may go.
  memory_.Release();
  disk_.ShrinkTo(disk_.bytes() / 2);
  return env_.cache
      .Get(SumsKey(), MemoryBytes(durable_),
           [&]() -> absl::StatusOr<SharedCache::Value> { return SharedCache::Value(sums); })
      .status();
}

absl::StatusOr<CalibrationSums> Calibration::Sums() {
  CalibrationRecord record;
  {
    const std::lock_guard lock(mu_);
    if (kept_ != nullptr) return *kept_;
    record = durable_;
  }
  const auto read = [&]() -> absl::StatusOr<SharedCache::Value> {
    const auto reader = env_.store.OpenBlob(record.sums);
    if (!reader.ok()) return reader.status();
    const auto sums = std::make_shared<CalibrationSums>();
    auto fit = ReadStatistics(**reader, 0, features_, mismatched_);
    if (!fit.ok()) return fit.status();
    fit->tokens = record.tokens;
    sums->fit = std::make_shared<const engine::Statistics>(*std::move(fit));
    if (holds_out_) {
      auto held_out = ReadStatistics(**reader, StatisticsBlobBytes(features_, mismatched_),
                                     features_, mismatched_);
      if (!held_out.ok()) return held_out.status();
      held_out->tokens = record.held_out_tokens;
      sums->held_out = std::make_shared<const engine::Statistics>(*std::move(held_out));
    }
    sums->sha256 = record.sums_sha256;
    return SharedCache::Value(sums);
  };
  const absl::StatusOr<SharedCache::Found> found =
      env_.cache.Get(SumsKey(), MemoryBytes(record), read);
  if (!found.ok()) return found.status();
  const auto shared = std::static_pointer_cast<const CalibrationSums>(found->value);
  // The parts keep the whole, and its reservation.
  return CalibrationSums{engine::SharedStatistics(shared, shared->fit.get()),
                         shared->held_out == nullptr
                             ? nullptr
                             : engine::SharedStatistics(shared, shared->held_out.get()),
                         shared->sha256};
}

std::unique_ptr<engine::FactorCache> Calibration::Factors() {
  return std::make_unique<CalibrationFactors>(env_, "calibration/" + id_ + "/factor/", features_);
}

}  // namespace certiq::server
