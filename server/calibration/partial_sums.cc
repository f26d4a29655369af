#include "calibration/partial_sums.h"

#include <algorithm>
#include <new>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "calibration/gram_file.h"

namespace certiq::server {
namespace {

using Clock = std::chrono::steady_clock;
using base::InvalidField;
using base::PreconditionError;

// The streams of one calibration at most, so that positions do not outgrow sums.
constexpr size_t kMaxStreams = 65536;
// Their ids and positions in one answer at most: clients take 4 MiB.
constexpr size_t kMaxStreamBytes = size_t{7} << 19;
// What the position of a stream takes in an answer beside its id, at most.
constexpr size_t kPositionBytes = 40;
// What a stream takes in memory beside its id, here and on its way into the catalog.
constexpr int64_t kStreamMemory = 512;
// Writing sums takes at most this share of the time between two writes.
constexpr int kCommitShare = 10;

int64_t StreamMemory(const std::string& stream_id) {
  return kStreamMemory + 3 * static_cast<int64_t>(stream_id.size());
}

absl::Status DeletedError(const std::string& id) {
  return absl::NotFoundError(absl::StrCat("calibration ", id, " was deleted"));
}

}  // namespace

PartialSums::PartialSums(const Environment& environment, CalibrationRecord record,
                         ByteBudget::Reservation memory)
    : env_(environment),
      id_(record.id()),
      tenant_(record.tenant()),
      features_(record.features()),
      mismatched_(record.mismatched()),
      holds_out_(record.held_out_fraction() > 0),
      fraction_(record.held_out_fraction()),
      block_rows_(std::max<int64_t>(record.held_out_block_rows(), 1)),
      strand_(std::make_shared<Strand>(environment.pool)),
      durable_(std::move(record)),
      committed_at_(Clock::now()),
      memory_(std::move(memory)) {
  const base::MutexLock lock(mu_);
  Restore();
}

int64_t PartialSums::MemoryBytes(const CalibrationRecord& record) {
  return SplitAccumulator::BytesFor(record.features(), record.mismatched(),
                                    record.held_out_fraction() > 0);
}

void PartialSums::Restore() {
  now_ = durable_;
  now_.clear_streams();
  streams_.clear();
  stream_bytes_ = 0;
  ByteBudget& memory = env_.quotas.Of(tenant_).memory;
  for (const StreamRecord& stream : durable_.streams()) {
    stream_bytes_ += stream.id().size() + kPositionBytes;
    streams_[stream.id()] = {.now = stream,
                             .durable = stream.sequence(),
                             .live = nullptr,
                             .memory = memory.Reserve(StreamMemory(stream.id()))};
  }
}

absl::StatusOr<ByteBudget::Reservation> PartialSums::ReserveStream(
    const std::string& stream_id) const {
  if (streams_.count(stream_id) > 0) return ByteBudget::Reservation();
  return env_.quotas.Of(tenant_).memory.TryReserve(StreamMemory(stream_id), "this stream");
}

PartialSums::Stream& PartialSums::AddStream(const std::string& stream_id,
                                            ByteBudget::Reservation memory) {
  const auto [entry, is_new] = streams_.try_emplace(stream_id);
  Stream& stream = entry->second;
  if (is_new) {
    stream.now.set_id(stream_id);
    stream.memory = std::move(memory);
    stream_bytes_ += stream_id.size() + kPositionBytes;
  }
  return stream;
}

absl::Status PartialSums::CheckRoomFor(const std::string& stream_id) const {
  if (streams_.count(stream_id) > 0) return absl::OkStatus();
  if (streams_.size() < kMaxStreams &&
      stream_bytes_ + stream_id.size() + kPositionBytes <= kMaxStreamBytes) {
    return absl::OkStatus();
  }
  // Streams are never taken back: no retry delay.
  return absl::ResourceExhaustedError(
      absl::StrCat("calibration ", id_, " has ", streams_.size(),
                   " streams, as many as it may have with ids of this length"));
}

absl::Status PartialSums::CheckUsable() const {
  if (deleted_) return DeletedError(id_);
  if (lost_) {
    return absl::DataLossError(absl::StrCat(
        "calibration ", id_, " ran out of memory in the middle of a chunk, and this server keeps ",
        "nothing on disk to go back to; delete it and start again"));
  }
  return absl::OkStatus();
}

StreamView PartialSums::ViewOf(const Stream& stream) {
  return {.id = stream.now.id(),
          .received = stream.now.sequence(),
          .durable = stream.durable,
          .tokens = stream.now.tokens(),
          .live = stream.live != nullptr,
          .imported = stream.now.imported()};
}

CalibrationRecord PartialSums::Received() const {
  const base::MutexLock lock(mu_);
  return now_;
}

std::vector<StreamView> PartialSums::Streams() const {
  const base::MutexLock lock(mu_);
  return ViewsOfStreams();
}

std::vector<StreamView> PartialSums::ViewsOfStreams() const {
  std::vector<StreamView> views;
  for (const auto& [id, stream] : streams_) views.push_back(ViewOf(stream));
  return views;
}

std::pair<StreamView, absl::Status> PartialSums::Look(const LiveStream& live) const {
  const base::MutexLock lock(mu_);
  StreamView view;
  if (const auto found = streams_.find(live.stream_id); found != streams_.end()) {
    view = ViewOf(found->second);
    view.live = found->second.live.get() == &live;
  }
  const auto ended = ended_.find(&live);
  return {std::move(view), ended == ended_.end() ? absl::OkStatus() : ended->second};
}

bool PartialSums::InUse(base::UnixMicros now) const {
  const base::MutexLock lock(mu_);
  return now < ExpireTime(now_) ||
         std::any_of(streams_.begin(), streams_.end(),
                     [](const auto& entry) { return entry.second.live != nullptr; });
}

PartialSums::LiveStreams PartialSums::EndLive(const absl::Status& reason) {
  LiveStreams told;
  for (auto& [id, stream] : streams_) {
    if (stream.live == nullptr) continue;
    ended_[stream.live.get()] = reason;
    told.push_back(std::exchange(stream.live, nullptr));
  }
  return told;
}

absl::Status PartialSums::Open(const std::shared_ptr<LiveStream>& live) {
  {
    const base::MutexLock lock(mu_);
    RETURN_IF_ERROR(CheckUsable());
    if (now_.finalize_time() != 0) return FinalizedError();
    const auto found = streams_.find(live->stream_id);
    if (found != streams_.end() && found->second.now.imported()) {
      return PreconditionError("IMPORTED", live->stream_id,
                               "ready-made sums were imported under this stream_id");
    }
    RETURN_IF_ERROR(CheckRoomFor(live->stream_id));
  }
  RETURN_IF_ERROR(Load());
  std::shared_ptr<LiveStream> older;
  {
    const base::MutexLock lock(mu_);
    ASSIGN_OR_RETURN(ByteBudget::Reservation memory, ReserveStream(live->stream_id));
    older = std::exchange(AddStream(live->stream_id, std::move(memory)).live, live);
    if (older != nullptr) {
      ended_[older.get()] =
          absl::AbortedError(absl::StrCat("a newer call opened the stream ", live->stream_id));
    }
  }
  if (older != nullptr) older->changed.Notify();
  return absl::OkStatus();
}

void PartialSums::Close(const LiveStream& live) {
  const base::MutexLock lock(mu_);
  ended_.erase(&live);
  const auto found = streams_.find(live.stream_id);
  if (found != streams_.end() && found->second.live.get() == &live) found->second.live = nullptr;
}

void PartialSums::Received(Stream& stream, int64_t fit, int64_t held_out) {
  stream.now.set_sequence(stream.now.sequence() + 1);
  stream.now.set_tokens(stream.now.tokens() + fit + held_out);
  now_.set_tokens(now_.tokens() + fit);
  now_.set_held_out_tokens(now_.held_out_tokens() + held_out);
  now_.set_update_time(base::Now());
  if (env_.storage.catalog->durable()) {
    dirty_ = true;
  } else {
    stream.durable = stream.now.sequence();
  }
}

absl::Status PartialSums::Fold(LiveStream& live, int64_t sequence, std::span<const std::byte> x,
                               std::span<const std::byte> x_quantized) {
  int64_t expected = 0;
  int64_t first_row = 0;
  {
    const base::MutexLock lock(mu_);
    RETURN_IF_ERROR(CheckUsable());
    if (const auto ended = ended_.find(&live); ended != ended_.end()) return ended->second;
    const StreamRecord& stream = streams_[live.stream_id].now;
    expected = stream.sequence();
    first_row = stream.tokens();
  }
  if (sequence >= 0 && sequence < expected) return absl::OkStatus();
  if (sequence != expected) {
    return InvalidField("chunk.sequence",
                        absl::StrCat("expected ", expected, ", the next of stream ", live.stream_id,
                                     ", or one received before, got ", sequence));
  }
  const int64_t row_bytes = features_ * engine::ItemSize(live.x_dtype);
  const auto bytes = static_cast<int64_t>(x.size());
  if (bytes == 0 || bytes % row_bytes != 0) {
    return InvalidField("chunk.x", absl::StrCat("expected whole rows of ", row_bytes,
                                                " bytes, at least one, got ", bytes, " bytes"));
  }
  const int64_t rows = bytes / row_bytes;
  const int64_t quantized =
      mismatched_ ? rows * features_ * engine::ItemSize(live.x_quantized_dtype) : 0;
  if (static_cast<int64_t>(x_quantized.size()) != quantized) {
    return InvalidField("chunk.x_quantized",
                        absl::StrCat("expected ", quantized, " bytes, ",
                                     mismatched_ ? "the same rows as x" : "as inputs are matched",
                                     ", got ", x_quantized.size(), " bytes"));
  }
  const engine::TokenRows inputs{live.x_dtype, x.data(), "chunk.x"};
  const engine::TokenRows quantized_inputs{live.x_quantized_dtype, x_quantized.data(),
                                           "chunk.x_quantized"};
  // A chunk counts whole or not at all: it is checked before any of it is folded.
  RETURN_IF_ERROR(mismatched_
                      ? engine::StatisticsAccumulator::CheckPair(inputs, quantized_inputs,
                                                                 features_, first_row, rows)
                      : engine::StatisticsAccumulator::Check(inputs, features_, first_row, rows));

  const engine::HeldOutSplit split(fraction_, block_rows_, live.stream_id);
  absl::StatusOr<int64_t> held_out_rows;
  try {
    held_out_rows = sums_->Append(inputs, mismatched_ ? &quantized_inputs : nullptr, first_row,
                                  rows, features_, split, env_.pool, /*cancellation=*/nullptr);
  } catch (const std::bad_alloc&) {
    held_out_rows = absl::ResourceExhaustedError("memory ran out");
  }
  if (!held_out_rows.ok()) {
    // Part of the chunk is in the sums.
    Lose();
    return absl::UnavailableError(absl::StrCat("the sums in memory were lost (",
                                               held_out_rows.status().message(),
                                               "): open the stream again"));
  }
  {
    const base::MutexLock lock(mu_);
    Received(streams_[live.stream_id], rows - *held_out_rows, *held_out_rows);
  }
  env_.observer.ActivationsFolded(rows, features_,
                                  static_cast<int64_t>(x.size() + x_quantized.size()));
  return absl::OkStatus();
}

absl::StatusOr<bool> PartialSums::Import(const std::string& stream_id, bool held_out,
                                         const engine::Statistics& sums) {
  bool known = false;
  {
    const base::MutexLock lock(mu_);
    RETURN_IF_ERROR(CheckUsable());
    if (const auto found = streams_.find(stream_id); found != streams_.end()) {
      if (!found->second.now.imported()) {
        return StreamTakenError(stream_id);
      }
      known = true;
    } else if (now_.finalize_time() != 0) {
      return FinalizedError();
    } else {
      RETURN_IF_ERROR(CheckRoomFor(stream_id));
    }
  }
  if (!known) {
    if (held_out && !holds_out_) {
      return PreconditionError(
          "HELD_OUT", "calibration_id",
          "the calibration holds nothing out: create it with a held_out_fraction above 0");
    }
    RETURN_IF_ERROR(Load());
    ByteBudget::Reservation memory;
    {
      // Before anything is added: there may be no room.
      const base::MutexLock lock(mu_);
      ASSIGN_OR_RETURN(memory, ReserveStream(stream_id));
    }
    sums_->Add(held_out, sums);
    const base::MutexLock lock(mu_);
    Stream& stream = AddStream(stream_id, std::move(memory));
    stream.now.set_imported(true);
    Received(stream, held_out ? 0 : sums.tokens, held_out ? sums.tokens : 0);
  }
  // A known one is committed too: an earlier attempt may have failed here.
  RETURN_IF_ERROR(Commit());
  return known;
}

absl::Status PartialSums::Load() {
  if (sums_.has_value()) return absl::OkStatus();
  CalibrationRecord record;
  {
    const base::MutexLock lock(mu_);
    record = durable_;
  }
  if (memory_.bytes() == 0) {
    ASSIGN_OR_RETURN(memory_, env_.quotas.Of(tenant_).memory.TryReserve(
                                  MemoryBytes(record), "loading this calibration"));
  }
  if (record.sums().name().empty()) {
    sums_.emplace(features_, mismatched_, holds_out_);
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(LoadedSums loaded, ReadSums(*env_.storage.blobs, record));
  sums_.emplace(std::move(loaded.fit), std::move(loaded.held_out));
  return absl::OkStatus();
}

void PartialSums::Lose() {
  sums_.reset();
  LiveStreams told;
  {
    const base::MutexLock lock(mu_);
    told = EndLive(absl::UnavailableError(
        "the sums in memory were lost: open the stream again and go on from what is durable"));
    lost_ = !env_.storage.catalog->durable();
    dirty_ = false;
    Restore();
  }
  for (const auto& live : told) live->changed.Notify();
}

SumsCommit PartialSums::CommitOfNow() const {
  SumsCommit commit;
  commit.tokens = now_.tokens();
  commit.held_out_tokens = now_.held_out_tokens();
  commit.update_time = now_.update_time();
  for (const auto& [id, stream] : streams_) {
    if (stream.now.sequence() > 0) commit.streams.push_back(stream.now);
  }
  return commit;
}

absl::Status PartialSums::Write(SumsCommit commit) {
  const Clock::time_point start = Clock::now();
  const engine::Statistics& fit = sums_->Flush(false, env_.pool);
  ASSIGN_OR_RETURN(
      const StoredSums stored,
      WriteSums(*env_.storage.blobs, fit, holds_out_ ? &sums_->Flush(true, env_.pool) : nullptr));
  commit.sums = stored.blob;
  commit.sums_sha256 = stored.sha256;
  absl::StatusOr<CalibrationRecord> written = env_.storage.catalog->CommitSums(id_, commit);
  if (!written.ok()) {
    env_.storage.Forget(stored.blob);
    return written.status();
  }
  BlobRef older;
  LiveStreams told;
  {
    const base::MutexLock lock(mu_);
    older = durable_.sums();
    durable_ = *std::move(written);
    now_ = durable_;
    now_.clear_streams();
    dirty_ = false;
    for (const StreamRecord& record : durable_.streams()) {
      Stream& stream = streams_[record.id()];
      stream.durable = record.sequence();
      if (stream.live != nullptr) told.push_back(stream.live);
    }
    committed_at_ = Clock::now();
    commit_took_ = committed_at_ - start;
  }
  env_.storage.Forget(older);
  for (const auto& live : told) live->changed.Notify();
  return absl::OkStatus();
}

absl::Status PartialSums::Commit() {
  SumsCommit commit;
  {
    const base::MutexLock lock(mu_);
    commit_posted_ = false;
    RETURN_IF_ERROR(CheckUsable());
    if (!dirty_) return absl::OkStatus();
    commit = CommitOfNow();
  }
  return Write(std::move(commit));
}

void PartialSums::CommitIfDue(Clock::time_point now, std::chrono::milliseconds interval) {
  {
    const base::MutexLock lock(mu_);
    const auto pause = std::max<Clock::duration>(interval, kCommitShare * commit_took_);
    if (!dirty_ || commit_posted_ || now < committed_at_ + pause) return;
    commit_posted_ = true;
  }
  const std::shared_ptr<PartialSums> self = shared_from_this();
  // What fails here fails again, and is told, when the stream ends.
  static_cast<void>(strand_->Post({.run = [self] { return self->Commit(); },
                                   .done =
                                       [self](const absl::Status&) {
                                         const base::MutexLock lock(self->mu_);
                                         self->commit_posted_ = false;
                                         self->committed_at_ = Clock::now();
                                       }}));
}

absl::StatusOr<SumsSnapshot> PartialSums::Export(bool held_out) {
  {
    const base::MutexLock lock(mu_);
    RETURN_IF_ERROR(CheckUsable());
  }
  RETURN_IF_ERROR(Load());
  SumsSnapshot snapshot;
  if (held_out && !holds_out_) return snapshot;
  ASSIGN_OR_RETURN(
      snapshot.reservation,
      env_.quotas.Of(tenant_).memory.TryReserve(
          engine::StatisticsAccumulator::BytesFor(features_, mismatched_), "this export"));
  snapshot.sums = std::make_shared<const engine::Statistics>(sums_->Flush(held_out, env_.pool));
  return snapshot;
}

absl::Status StreamTakenError(const std::string& stream_id) {
  return PreconditionError("STREAM", stream_id, "this stream_id belongs to an Accumulate stream");
}

absl::Status CheckExpectations(const FinalizeExpectations& expected, int64_t tokens,
                               const std::vector<StreamView>& streams) {
  if (expected.tokens.has_value() && *expected.tokens != tokens) {
    return PreconditionError("TOKENS", "expected_tokens",
                             absl::StrCat("expected ", *expected.tokens, " tokens, there are ",
                                          tokens, ", held-out ones included"));
  }
  std::map<std::string, const StreamView*> by_id;
  for (const StreamView& stream : streams) by_id[stream.id] = &stream;
  for (const std::string& id : expected.stream_ids) {
    const auto found = by_id.find(id);
    if (found == by_id.end() || found->second->received == 0) {
      return PreconditionError("STREAM", id, absl::StrCat("stream ", id, " has sent nothing"));
    }
    if (found->second->live) {
      return PreconditionError("STREAM", id,
                               absl::StrCat("stream ", id, " has an open call: it may send more"));
    }
  }
  return absl::OkStatus();
}

absl::Status PartialSums::Finalize(const FinalizeExpectations& expected) {
  SumsCommit commit;
  int64_t memory_bytes = 0;
  int64_t stored_bytes = 0;
  {
    const base::MutexLock lock(mu_);
    RETURN_IF_ERROR(CheckUsable());
    RETURN_IF_ERROR(
        CheckExpectations(expected, now_.tokens() + now_.held_out_tokens(), ViewsOfStreams()));
    if (now_.finalize_time() != 0) return FinalizedError();
    if (now_.tokens() == 0) {
      return PreconditionError("TOKENS", "calibration_id",
                               "the calibration has no tokens to fit layers to");
    }
    commit = CommitOfNow();
    memory_bytes = MemoryBytes(now_);
    if (!env_.storage.catalog->durable()) stored_bytes = SumsBytes(now_);
  }
  RETURN_IF_ERROR(Load());
  commit.finalize = true;
  commit.update_time = base::Now();
  // Without a disk the blob of the sums is in memory too.
  RETURN_IF_ERROR(memory_.Resize(memory_bytes + stored_bytes, "finalizing this calibration"));
  if (absl::Status written = Write(std::move(commit)); !written.ok()) {
    memory_.ShrinkTo(memory_bytes);
    return written;
  }
  LiveStreams told;
  {
    const base::MutexLock lock(mu_);
    told = EndLive(FinalizedError());
  }
  for (const auto& live : told) live->changed.Notify();
  return absl::OkStatus();
}

SplitSums PartialSums::TakeSums() {
  SplitSums sums = std::move(*sums_).Finish(env_.pool);
  sums_.reset();
  return sums;
}

absl::Status PartialSums::Remove(const std::function<absl::Status()>& remove) {
  {
    const base::MutexLock lock(mu_);
    if (deleted_) return DeletedError(id_);
    deleted_ = true;
  }
  absl::Status removed = remove();
  LiveStreams told;
  {
    const base::MutexLock lock(mu_);
    deleted_ = removed.ok();
    if (removed.ok()) {
      told = EndLive(DeletedError(id_));
      // A call may have the object for a while yet.
      streams_.clear();
    }
  }
  for (const auto& live : told) live->changed.Notify();
  if (!removed.ok()) return removed;
  sums_.reset();
  memory_.Release();
  return absl::OkStatus();
}

}  // namespace certiq::server
