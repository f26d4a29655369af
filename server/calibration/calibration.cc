#include "calibration/calibration.h"

#include <algorithm>
#include <functional>
#include <new>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/sha256.h"
#include "base/status.h"
#include "calibration/gram_file.h"

namespace certiq::server {
namespace {

// Of one calibration, so that positions do not outgrow sums.
constexpr size_t kMaxStreams = 65536;

using Clock = std::chrono::steady_clock;
using base::InvalidField;
using base::PreconditionError;

}  // namespace

Calibration::Pin::~Pin() {
  if (calibration_ == nullptr) return;
  const std::lock_guard lock(calibration_->mu_);
  --calibration_->pins_;
}

Calibration::Calibration(const Environment& environment, CalibrationRecord record,
                         ByteBudget::Reservation memory, ByteBudget::Reservation disk)
    : env_(environment),
      id_(record.id),
      tenant_(record.tenant),
      features_(record.features),
      mismatched_(record.mismatched),
      // Ready-made sums may be held out without a share of the rows being so.
      holds_out_(record.held_out_fraction > 0),
      fraction_(record.held_out_fraction),
      block_rows_(std::max<int64_t>(record.held_out_block_rows, 1)),
      strand_(std::make_shared<Strand>(environment.pool)),
      durable_(std::move(record)),
      now_(durable_),
      committed_at_(Clock::now()),
      memory_(std::move(memory)),
      disk_(std::move(disk)) {
  now_.streams.clear();
  for (const StreamRecord& stream : durable_.streams) {
    streams_[stream.id] = {stream, stream.sequence, nullptr};
  }
}

int64_t Calibration::MemoryBytes(const CalibrationRecord& record) {
  return Portions(record) *
         engine::StatisticsAccumulator::BytesFor(record.features, record.mismatched);
}

int64_t Calibration::DiskBytes(const CalibrationRecord& record) {
  return 2 * Portions(record) * StatisticsBlobBytes(record.features, record.mismatched);
}

absl::Status Calibration::IsFinalized() {
  return PreconditionError("FINALIZED", "calibration_id",
                           "the calibration is finalized and takes no more tokens");
}

absl::Status Calibration::CheckRoomFor(const std::string& stream_id) const {
  if (streams_.size() < kMaxStreams || streams_.count(stream_id) > 0) return absl::OkStatus();
  // Streams are never taken back: no retry delay.
  return absl::ResourceExhaustedError(
      absl::StrCat("calibration ", id_, " has ", kMaxStreams, " streams, as many as it may have"));
}

absl::Status Calibration::Usable() const {
  if (deleted_) return absl::NotFoundError(absl::StrCat("calibration ", id_, " was deleted"));
  if (lost_) {
    return absl::DataLossError(absl::StrCat(
        "calibration ", id_, " ran out of memory in the middle of a chunk, and this server keeps ",
        "nothing on disk to go back to; delete it and start again"));
  }
  return absl::OkStatus();
}

StreamView Calibration::ViewOf(const Stream& stream) const {
  return {.id = stream.now.id,
          .received = stream.now.sequence,
          .durable = stream.durable,
          .tokens = stream.now.tokens,
          .live = stream.live != nullptr,
          .imported = stream.now.imported};
}

CalibrationView Calibration::View(bool with_streams) const {
  const std::lock_guard lock(mu_);
  CalibrationView view;
  view.record = now_;
  view.bytes = Portions(now_) * StatisticsBlobBytes(features_, mismatched_);
  view.expire_time = now_.update_time + now_.ttl_micros;
  view.jobs = pins_;
  if (!with_streams) return view;
  for (const auto& [id, stream] : streams_) view.streams.push_back(ViewOf(stream));
  return view;
}

std::pair<StreamView, absl::Status> Calibration::Look(const LiveStream& live) const {
  const std::lock_guard lock(mu_);
  StreamView view;
  if (const auto found = streams_.find(live.stream_id); found != streams_.end()) {
    view = ViewOf(found->second);
  }
  const auto ended = ended_.find(&live);
  return {std::move(view), ended == ended_.end() ? absl::OkStatus() : ended->second};
}

std::vector<std::shared_ptr<LiveStream>> Calibration::EndLive(const absl::Status& reason) {
  std::vector<std::shared_ptr<LiveStream>> told;
  for (auto& [id, stream] : streams_) {
    if (stream.live == nullptr) continue;
    ended_[stream.live.get()] = reason;
    told.push_back(std::exchange(stream.live, nullptr));
  }
  return told;
}

absl::Status Calibration::Open(const std::shared_ptr<LiveStream>& live) {
  {
    const std::lock_guard lock(mu_);
    if (absl::Status usable = Usable(); !usable.ok()) return usable;
    if (now_.finalize_time != 0) return IsFinalized();
    const auto found = streams_.find(live->stream_id);
    if (found != streams_.end() && found->second.now.imported) {
      return PreconditionError("IMPORTED", live->stream_id,
                               "ready-made sums were imported under this stream_id");
    }
    if (absl::Status room = CheckRoomFor(live->stream_id); !room.ok()) return room;
  }
  if (absl::Status loaded = Load(); !loaded.ok()) return loaded;
  std::shared_ptr<LiveStream> older;
  {
    const std::lock_guard lock(mu_);
    Stream& stream = streams_[live->stream_id];
    stream.now.id = live->stream_id;
    older = std::exchange(stream.live, live);
    if (older != nullptr) {
      ended_[older.get()] =
          absl::AbortedError(absl::StrCat("a newer call opened the stream ", live->stream_id));
    }
  }
  if (older != nullptr) older->changed.Notify();
  return absl::OkStatus();
}

void Calibration::Close(const LiveStream& live) {
  const std::lock_guard lock(mu_);
  ended_.erase(&live);
  const auto found = streams_.find(live.stream_id);
  if (found != streams_.end() && found->second.live.get() == &live) found->second.live = nullptr;
}

absl::Status Calibration::FoldRows(const LiveStream& live, int64_t first_row, int64_t rows,
                                   const std::byte* x, const std::byte* x_quantized,
                                   int64_t& held_out_rows) {
  const engine::HeldOutSplit split(fraction_, block_rows_, live.stream_id);
  const int64_t x_bytes = features_ * engine::ItemSize(live.x_dtype);
  const int64_t quantized_bytes = features_ * engine::ItemSize(live.x_quantized_dtype);
  for (int64_t begin = 0; begin < rows;) {
    const int64_t row = first_row + begin;
    const int64_t block = std::min(rows - begin, split.BlockEnd(row) - row);
    const bool held_out = holds_out_ && split.IsHeldOut(row);
    engine::StatisticsAccumulator& sums = held_out ? *held_out_ : *fit_;
    const engine::TokenRows inputs{live.x_dtype, x + begin * x_bytes, "chunk.x"};
    absl::Status folded =
        mismatched_ ? sums.AppendPair(inputs,
                                      {live.x_quantized_dtype,
                                       x_quantized + begin * quantized_bytes, "chunk.x_quantized"},
                                      row, block, env_.pool)
                    : sums.Append(inputs, row, block, env_.pool);
    if (!folded.ok()) return folded;
    if (held_out) held_out_rows += block;
    begin += block;
  }
  return absl::OkStatus();
}

absl::Status Calibration::Fold(LiveStream& live, int64_t sequence, std::span<const std::byte> x,
                               std::span<const std::byte> x_quantized) {
  int64_t expected = 0;
  int64_t first_row = 0;
  {
    const std::lock_guard lock(mu_);
    if (absl::Status usable = Usable(); !usable.ok()) return usable;
    if (const auto ended = ended_.find(&live); ended != ended_.end()) return ended->second;
    const StreamRecord& stream = streams_[live.stream_id].now;
    expected = stream.sequence;
    first_row = stream.tokens;
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
  absl::Status checked =
      mismatched_ ? engine::StatisticsAccumulator::CheckPair(
                        inputs, {live.x_quantized_dtype, x_quantized.data(), "chunk.x_quantized"},
                        features_, first_row, rows)
                  : engine::StatisticsAccumulator::Check(inputs, features_, first_row, rows);
  if (!checked.ok()) return checked;

  int64_t held_out_rows = 0;
  absl::Status folded;
  try {
    folded = FoldRows(live, first_row, rows, x.data(), x_quantized.data(), held_out_rows);
  } catch (const std::bad_alloc&) {
    folded = absl::ResourceExhaustedError("memory ran out");
  }
  if (!folded.ok()) {
    // Part of the chunk is in the sums.
    Lose();
    return absl::UnavailableError(absl::StrCat("the sums in memory were lost (", folded.message(),
                                               "): open the stream again"));
  }
  {
    const std::lock_guard lock(mu_);
    Stream& stream = streams_[live.stream_id];
    ++stream.now.sequence;
    stream.now.tokens += rows;
    now_.tokens += rows - held_out_rows;
    now_.held_out_tokens += held_out_rows;
    now_.update_time = base::Now();
    if (env_.store.durable()) {
      dirty_ = true;
    } else {
      stream.durable = stream.now.sequence;
    }
  }
  env_.observer.ActivationsFolded(rows, features_,
                                  static_cast<int64_t>(x.size() + x_quantized.size()));
  return absl::OkStatus();
}

absl::StatusOr<bool> Calibration::Import(const std::string& stream_id, bool held_out,
                                         const engine::Statistics& sums) {
  bool known = false;
  {
    const std::lock_guard lock(mu_);
    if (absl::Status usable = Usable(); !usable.ok()) return usable;
    if (const auto found = streams_.find(stream_id); found != streams_.end()) {
      if (!found->second.now.imported) {
        return PreconditionError("STREAM", stream_id,
                                 "this stream_id belongs to an Accumulate stream");
      }
      known = true;
    } else if (now_.finalize_time != 0) {
      return IsFinalized();
    } else if (absl::Status room = CheckRoomFor(stream_id); !room.ok()) {
      return room;
    }
  }
  if (!known) {
    if (held_out && !holds_out_) {
      return PreconditionError(
          "HELD_OUT", "calibration_id",
          "the calibration holds nothing out: create it with a held_out_fraction above 0");
    }
    if (absl::Status loaded = Load(); !loaded.ok()) return loaded;
    (held_out ? *held_out_ : *fit_).Add(sums);
    const std::lock_guard lock(mu_);
    Stream& stream = streams_[stream_id];
    stream.now = {.id = stream_id, .sequence = 1, .tokens = sums.tokens, .imported = true};
    (held_out ? now_.held_out_tokens : now_.tokens) += sums.tokens;
    now_.update_time = base::Now();
    if (env_.store.durable()) {
      dirty_ = true;
    } else {
      stream.durable = 1;
    }
  }
  // For a known one too: an earlier attempt may have failed here.
  if (absl::Status committed = Commit(); !committed.ok()) return committed;
  return known;
}

absl::StatusOr<Calibration::Pin> Calibration::PinFinalized() {
  const std::lock_guard lock(mu_);
  if (absl::Status usable = Usable(); !usable.ok()) return usable;
  if (now_.finalize_time == 0) {
    return PreconditionError("NOT_FINALIZED", id_, "the calibration is not finalized");
  }
  ++pins_;
  return Pin(shared_from_this());
}

absl::Status Calibration::Remove() {
  std::vector<std::shared_ptr<LiveStream>> told;
  BlobRef blob;
  {
    const std::lock_guard lock(mu_);
    if (deleted_) return absl::NotFoundError(absl::StrCat("calibration ", id_, " was deleted"));
    if (pins_ > 0) {
      return PreconditionError(
          "IN_USE", id_, absl::StrCat(pins_, " jobs that have not ended use the calibration"));
    }
    deleted_ = true;
  }
  if (absl::Status gone = env_.store.DeleteCalibration(id_); !gone.ok()) {
    const std::lock_guard lock(mu_);
    deleted_ = false;
    return gone;
  }
  {
    const std::lock_guard lock(mu_);
    told = EndLive(absl::NotFoundError(absl::StrCat("calibration ", id_, " was deleted")));
    blob = durable_.sums;
    kept_ = nullptr;
  }
  for (const auto& live : told) live->changed.Notify();
  if (!blob.empty()) env_.store.DeleteBlob(blob);
  env_.cache.Drop("calibration/" + id_ + "/");
  fit_.reset();
  held_out_.reset();
  memory_.Release();
  disk_.Release();
  return absl::OkStatus();
}

bool Calibration::Expired(base::UnixMicros now) const {
  const std::lock_guard lock(mu_);
  if (pins_ > 0 || deleted_ || now < now_.update_time + now_.ttl_micros) return false;
  return std::none_of(streams_.begin(), streams_.end(),
                      [](const auto& entry) { return entry.second.live != nullptr; });
}

}  // namespace certiq::server
