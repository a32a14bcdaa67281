#include "libs/learning/mirror.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/replay/chunk_codec.h"
#include "libs/tensors/tensors.h"
#include "libs/world_model/parallel_rows.h"

namespace orrery {
namespace {

// Evictions arrive after the appends that caused them, so the mirror may hold a little more than replay keeps.
constexpr int64_t kSlackFraction = 8;

Mirror::Field MakeField(const std::string& name, DType dtype, std::vector<int64_t> shape) {
  int64_t bytes = static_cast<int64_t>(SizeOf(dtype));
  for (const int64_t size : shape) bytes *= size;
  return {name, dtype, std::move(shape), bytes};
}

std::vector<Mirror::Field> FieldsOf(const config::v1::Model& model) {
  std::vector<Mirror::Field> fields;
  for (const config::v1::Modality& modality : model.modalities()) {
    if (modality.has_image()) {
      const config::v1::ImageModality& image = modality.image();
      fields.push_back(
          MakeField(modality.name(), DType::kUInt8, {image.height(), image.width(), image.channels()}));
    } else {
      fields.push_back(MakeField(modality.name(), DType::kFloat32, {modality.vector().size()}));
    }
  }
  fields.push_back(MakeField(kAction, DType::kFloat32, {ActionSize(model)}));
  fields.push_back(MakeField(kReward, DType::kFloat32, {}));
  fields.push_back(MakeField(kIsFirst, DType::kUInt8, {}));
  fields.push_back(MakeField(kIsTerminal, DType::kUInt8, {}));
  return fields;
}

absl::Status CheckField(const Array& array, const Mirror::Field& field, int64_t rows) {
  std::vector<int64_t> expected = {rows};
  expected.insert(expected.end(), field.shape.begin(), field.shape.end());
  if (array.dtype != field.dtype || array.shape != expected) {
    return absl::FailedPreconditionError(absl::StrCat("field \"", field.name, "\" is ", Name(array.dtype), " ",
                                                      ShapeString(array.shape), ", the model expects ",
                                                      Name(field.dtype), " ", ShapeString(expected)));
  }
  RETURN_IF_ERROR(CheckArray(array, field.name));
  if (field.dtype == DType::kFloat32) {
    const absl::Span<const float> values = array.as<float>();
    if (!std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); })) {
      return absl::FailedPreconditionError(absl::StrCat("field \"", field.name, "\" holds a number that is not finite"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Mirror>> Mirror::Create(const Options& options) {
  RETURN_IF_ERROR(Validate(options.model, /*complete=*/true));
  auto mirror = std::unique_ptr<Mirror>(new Mirror(options));
  if (options.max_rows > options.max_bytes / mirror->row_bytes_) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "replay.max_rows ", options.max_rows, " of ", mirror->row_bytes_, " bytes each are more than learning.mirror_bytes ",
        options.max_bytes, ": lower replay.max_rows to ", options.max_bytes / mirror->row_bytes_,
        " or raise learning.mirror_bytes"));
  }
  return mirror;
}

Mirror::Mirror(const Options& options)
    : options_(options),
      fields_(FieldsOf(options.model)),
      index_(std::make_unique<EpisodeIndex>(options.sequence_length)),
      last_change_(options.clock->Now()) {
  for (const Field& field : fields_) row_bytes_ += field.row_bytes;
}

Mirror::~Mirror() { Stop(); }

void Mirror::Follow(std::unique_ptr<ChunkWatcher> watcher) {
  watcher_ = std::move(watcher);
  feeder_ = std::thread([this] { Feed(); });
}

void Mirror::Stop() {
  {
    absl::MutexLock lock(&mu_);
    if (failure_.ok()) failure_ = absl::CancelledError("the mirror was stopped");
    changed_.SignalAll();
  }
  if (watcher_ != nullptr) watcher_->Close();
  if (feeder_.joinable()) feeder_.join();
}

void Mirror::Feed() {
  while (true) {
    absl::StatusOr<ChunkWatcher::Event> event = watcher_->Next(absl::Now() + absl::Seconds(60));
    if (absl::IsDeadlineExceeded(event.status())) continue;
    if (absl::IsCancelled(event.status())) return;
    absl::Status status = event.status();
    if (status.ok()) {
      const absl::Status applied = Apply(*std::move(event));
      if (!applied.ok() && !absl::IsResourceExhausted(applied)) LogWarning("chunk skipped: {}", applied.ToString());
      if (absl::IsResourceExhausted(applied)) status = applied;
    }
    if (!status.ok()) {
      absl::MutexLock lock(&mu_);
      if (failure_.ok()) failure_ = Annotate(status, "the mirror of the data set stopped");
      changed_.SignalAll();
      return;
    }
  }
}

absl::StatusOr<Mirror::Rows> Mirror::DecodeChunk(const Chunk& chunk) const {
  // Room for modalities that the model does not use; a payload that claims more is refused before it is unpacked.
  const int64_t limit = 16 * chunk.info.rows * row_bytes_ + (int64_t{1} << 20);
  ASSIGN_OR_RETURN(ArrayMap decoded, DecodeRows(chunk.payload, chunk.info.rows, limit));
  Rows kept;
  for (const Field& field : fields_) {
    const auto found = decoded.find(field.name);
    if (found == decoded.end()) {
      return absl::FailedPreconditionError(absl::StrCat("field \"", field.name, "\" of the model is missing"));
    }
    RETURN_IF_ERROR(CheckField(found->second, field, chunk.info.rows));
    kept.push_back(std::move(found->second));
  }
  return kept;
}

absl::Status Mirror::Apply(ChunkWatcher::Event event) {
  std::optional<Rows> rows;
  absl::Status refused;
  if (event.appended.has_value() && event.appended->info.mode != EpisodeMode::kEvaluate) {
    const ChunkInfo& info = event.appended->info;
    absl::StatusOr<Rows> decoded = DecodeChunk(*event.appended);
    if (decoded.ok()) {
      rows = *std::move(decoded);
    } else {
      refused = Annotate(decoded.status(), absl::StrCat("episode ", info.key.episode_id, " row ", info.key.first_row));
      if (options_.refused_chunks != nullptr) options_.refused_chunks->Increment();
    }
  }
  absl::MutexLock lock(&mu_);
  if (event.reset) {
    chunks_.clear();
    index_ = std::make_unique<EpisodeIndex>(options_.sequence_length);
    rows_seen_ = 0;
    rows_evicted_ = 0;
    awaited_rows_ = -1;
    caught_up_ = false;
  }
  if (rows.has_value()) RETURN_IF_ERROR(Insert(event.appended->info, *std::move(rows)));
  // A refused chunk arrived as well: whoever waits for its rows must not wait for ever.
  if (!refused.ok()) rows_seen_ += event.appended->info.rows;
  if (event.evicted.has_value() && chunks_.erase(*event.evicted) > 0) index_->Evict(*event.evicted);
  caught_up_ = (caught_up_ && !event.interrupted) || event.caught_up;
  last_change_ = options_.clock->Now();
  changed_.SignalAll();
  return refused;
}

absl::Status Mirror::Insert(const ChunkInfo& info, Rows rows) {
  if (chunks_.contains(info.key)) return absl::OkStatus();
  const int64_t held = index_->totals().rows + info.rows;
  if (held > (options_.max_bytes + options_.max_bytes / kSlackFraction) / row_bytes_) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the data set has ", held, " rows of ", row_bytes_, " bytes, more than learning.mirror_bytes ",
        options_.max_bytes, ": replay keeps more than this learner's replay.max_rows ", options_.max_rows));
  }
  chunks_.emplace(info.key, std::move(rows));
  index_->Append(info);
  rows_seen_ += info.rows;
  return absl::OkStatus();
}

absl::Status Mirror::WaitForRows(int64_t rows, absl::Duration patience, absl::Time deadline) {
  absl::MutexLock lock(&mu_);
  while (rows_seen_ + rows_evicted_ < rows) {
    RETURN_IF_ERROR(failure_);
    const absl::Time now = options_.clock->Now();
    if (std::exchange(awaited_rows_, rows) != rows) awaited_since_ = now;
    const absl::Time patient_until =
        caught_up_ ? std::max(last_change_, awaited_since_) + patience : absl::InfiniteFuture();
    if (now >= patient_until) {
      rows_evicted_ = rows - rows_seen_;
      LogInfo("mirror has all live rows seen={} evicted_before={}", rows_seen_, rows_evicted_);
      break;
    }
    if (now >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("the mirror has ", rows_seen_ + rows_evicted_, " of ", rows, " rows"));
    }
    options_.clock->WaitUntil(changed_, mu_, std::min(deadline, patient_until));
  }
  return failure_;
}

absl::Status Mirror::AwaitStart(absl::Time deadline) {
  while (failure_.ok() && index_->valid_starts() == 0) {
    if (options_.clock->Now() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat("no episode of ", options_.sequence_length, " rows yet, ",
                                                      index_->totals().rows, " rows are there"));
    }
    options_.clock->WaitUntil(changed_, mu_, deadline);
  }
  return failure_;
}

IndexTotals Mirror::totals() const {
  absl::MutexLock lock(&mu_);
  return index_->totals();
}

MirroredSource::MirroredSource(Mirror* mirror, int batch_size, uint64_t seed, torch::Device device, BatchPart part)
    : mirror_(mirror),
      whole_batch_(batch_size),
      batch_size_(batch_size / part.ranks),
      first_(part.rank * batch_size_),
      pinned_(device.is_cuda()),
      random_(seed),
      to_device_(device),
      thread_([this] { Work(); }) {}

MirroredSource::~MirroredSource() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    changed_.SignalAll();
  }
  thread_.join();
}

void MirroredSource::Work() {
  UseTorchThreads();
  while (true) {
    {
      absl::MutexLock lock(&mu_);
      while (!stopping_ && !wanted_) changed_.Wait(&mu_);
      if (stopping_) return;
    }
    // It does not wait for data: where there are none, or the mirror has failed, Next finds that out itself.
    absl::StatusOr<StoredBatch> batch = Gather(random_ahead_, buffers_ahead_, absl::InfinitePast());
    absl::MutexLock lock(&mu_);
    if (batch.ok()) prefetched_ = *std::move(batch);
    wanted_ = false;
    changed_.SignalAll();
  }
}

void MirroredSource::Prefetch() {
  absl::MutexLock lock(&mu_);
  if (wanted_ || prefetched_.has_value()) return;
  random_ahead_ = random_;
  wanted_ = true;
  changed_.SignalAll();
}

std::optional<StoredBatch> MirroredSource::TakePrefetched() {
  absl::MutexLock lock(&mu_);
  while (wanted_) changed_.Wait(&mu_);
  return std::exchange(prefetched_, std::nullopt);
}

absl::StatusOr<StoredBatch> MirroredSource::Next(absl::Time deadline) {
  std::optional<StoredBatch> prefetched = TakePrefetched();
  if (!prefetched.has_value()) return Gather(random_, buffers_, deadline);
  random_ = random_ahead_;
  std::swap(buffers_, buffers_ahead_);
  return *std::move(prefetched);
}

absl::StatusOr<StoredBatch> MirroredSource::Gather(std::mt19937_64& random, Buffers& buffers, absl::Time deadline) {
  return CatchExceptions("gathering a batch", [&]() -> absl::StatusOr<StoredBatch> {
    RETURN_IF_ERROR(Fill(random, buffers, deadline));
    return OnDevice(buffers);
  });
}

absl::Status MirroredSource::Fill(std::mt19937_64& random, Buffers& buffers, absl::Time deadline) {
  const std::vector<Mirror::Field>& fields = mirror_->fields();
  std::vector<char*> targets;
  for (const Mirror::Field& field : fields) {
    torch::Tensor& buffer = buffers[field.name];
    // A tensor that the caller still holds, itself or as a view, is left alone.
    if (!buffer.defined() || buffer.use_count() > 1 || buffer.storage().use_count() > 1) {
      std::vector<int64_t> shape = {mirror_->sequence_length(), batch_size_};
      shape.insert(shape.end(), field.shape.begin(), field.shape.end());
      buffer = torch::empty(shape, torch::TensorOptions().dtype(ToTorch(field.dtype)).pinned_memory(pinned_));
    }
    targets.push_back(static_cast<char*>(buffer.data_ptr()));
  }
  const auto copy = [&](size_t field, int64_t sequence, int64_t step, const char* row) {
    const int64_t row_bytes = fields[field].row_bytes, place = sequence - first_;
    if (place < 0 || place >= batch_size_) return;
    std::memcpy(targets[field] + (step * batch_size_ + place) * row_bytes, row, static_cast<size_t>(row_bytes));
  };
  return mirror_->Sample(whole_batch_, random, deadline, copy);
}

StoredBatch MirroredSource::OnDevice(const Buffers& buffers) {
  std::vector<torch::Tensor> tensors;
  for (const auto& entry : buffers) tensors.push_back(entry.second);
  tensors = to_device_.Copy(std::move(tensors));
  StoredBatch batch;
  size_t next = 0;
  for (const auto& entry : buffers) {
    const std::string& name = entry.first;
    torch::Tensor& place = name == kAction       ? batch.action
                           : name == kReward     ? batch.reward
                           : name == kIsFirst    ? batch.is_first
                           : name == kIsTerminal ? batch.is_terminal
                                                 : batch.observations[name];
    place = std::move(tensors[next++]);
  }
  return batch;
}

std::string MirroredSource::State() const {
  std::ostringstream out;
  out << random_;
  return out.str();
}

absl::Status MirroredSource::SetState(const std::string& state) {
  std::istringstream in(state);
  std::mt19937_64 random;
  if (!(in >> random)) return absl::InvalidArgumentError("not a state of the batch sampler");
  TakePrefetched();
  random_ = random;
  return absl::OkStatus();
}

}  // namespace orrery
