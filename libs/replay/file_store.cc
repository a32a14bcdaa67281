#include "libs/replay/file_store.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "libs/base/file.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/replay/change_log.h"
#include "libs/replay/chunk_text.h"
#include "libs/replay/segment_file.h"

namespace orrery {
namespace {

using RecordType = SegmentFile::RecordType;

constexpr char kFormat[] = "orrery-replay 1\n";
constexpr char kSegmentPrefix[] = "segment-";
constexpr char kSegmentSuffix[] = ".log";
constexpr char kValuePrefix[] = "value-";
constexpr char kSnapshot[] = "snapshot";
constexpr char kFormatFile[] = "format";
constexpr char kLockFile[] = "lock";

// A small file: a line of its own with numbers and the checksum of the rest, then the rest.
std::string Seal(absl::string_view first, int64_t a, int64_t b, absl::string_view rest) {
  return absl::StrCat(first, " ", a, " ", b, " ", Checksum(rest), "\n", rest);
}

struct Unsealed {
  int64_t a = 0, b = 0;
  std::string rest;
};

absl::StatusOr<Unsealed> Unseal(absl::string_view first, const std::string& path) {
  ASSIGN_OR_RETURN(const std::string contents, ReadFile(path));
  const std::pair<absl::string_view, absl::string_view> parts = absl::StrSplit(contents, absl::MaxSplits('\n', 1));
  const std::vector<absl::string_view> words = absl::StrSplit(parts.first, ' ');
  Unsealed result;
  uint32_t checksum = 0;
  if (words.size() != 4 || words[0] != first || !absl::SimpleAtoi(words[1], &result.a) ||
      !absl::SimpleAtoi(words[2], &result.b) || !absl::SimpleAtoi(words[3], &checksum) ||
      checksum != Checksum(parts.second)) {
    return absl::DataLossError(absl::StrCat(path, " is damaged"));
  }
  result.rest = std::string(parts.second);
  return result;
}

bool IsSegment(absl::string_view name, int64_t& number) {
  return absl::ConsumePrefix(&name, kSegmentPrefix) && absl::ConsumeSuffix(&name, kSegmentSuffix) &&
         absl::SimpleAtoi(name, &number);
}

// Thread-safe. Chunks are read from their segments when asked for; only what an index needs is in memory.
class FileStore : public Store {
 public:
  FileStore(const FileStoreOptions& options, int lock_fd, Clock& clock)
      : options_(options), lock_fd_(lock_fd), clock_(clock), log_(options.change_log_length) {}
  ~FileStore() override { close(lock_fd_); }

  absl::Status Load() ABSL_LOCKS_EXCLUDED(mu_, values_mu_);

  absl::Status Append(const Chunk& chunk) override;
  absl::StatusOr<std::vector<std::optional<Chunk>>> Read(absl::Span<const ChunkKey> keys) override;
  absl::StatusOr<ChangeBatch> Changes(const std::string& cursor, int max, absl::Duration wait) override {
    return log_.Read(cursor, max, wait);
  }
  absl::Status Evict(absl::Span<const ChunkKey> keys) override;
  absl::StatusOr<VersionedValue> Get(const std::string& name) override;
  absl::Status CompareAndSet(const std::string& name, int64_t expected_version, const std::string& value) override;
  absl::Status PutSnapshot(const Snapshot& snapshot) override;
  absl::StatusOr<Snapshot> GetSnapshot() override;
  absl::StatusOr<absl::Time> Now() override { return clock_.Now(); }

 private:
  struct Entry {
    ChunkInfo info;
    std::string run_id;
    int64_t segment = 0;
    SegmentFile::Place place;
    int64_t record = 0;  // number of the record, for syncing
  };
  struct Segment {
    std::shared_ptr<SegmentFile> file;
    int64_t live = 0;
  };

  std::string SegmentPath(int64_t number) const {
    return absl::StrFormat("%s/%s%09d%s", options_.folder, kSegmentPrefix, number, kSegmentSuffix);
  }
  std::string ValuePath(const std::string& name) const { return absl::StrCat(options_.folder, "/", kValuePrefix, name); }
  std::string SnapshotPath() const { return absl::StrCat(options_.folder, "/", kSnapshot); }

  absl::Status LoadSegments(const std::vector<int64_t>& numbers) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status LoadRecord(int64_t number, RecordType type, absl::string_view head, const SegmentFile::Place& place)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Begins a new segment if the newest is full. Gives mu_ up while it waits.
  absl::Status MakeRoom() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Returns once records up to number `record` are on the disk; one of the waiting threads syncs for all.
  absl::Status AwaitSync(int64_t record) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CompareWithStored(const Entry& entry, const Chunk& chunk) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Remove(std::map<ChunkKey, Entry>::iterator entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DeleteEmptySegments() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const FileStoreOptions options_;
  const int lock_fd_;
  Clock& clock_;
  ChangeLog log_;  // its lock is taken after mu_

  absl::Mutex mu_;
  absl::CondVar synced_changed_;
  std::map<ChunkKey, Entry> chunks_ ABSL_GUARDED_BY(mu_);
  std::map<int64_t, Segment> segments_ ABSL_GUARDED_BY(mu_);  // the last one is written to; never empty once loaded
  int64_t written_ ABSL_GUARDED_BY(mu_) = 0;  // records
  int64_t synced_ ABSL_GUARDED_BY(mu_) = 0;   // of those, on the disk
  bool syncing_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status failed_ ABSL_GUARDED_BY(mu_);  // of a sync: what is on the disk is unknown from then on

  absl::Mutex values_mu_;
  std::map<std::string, VersionedValue> values_ ABSL_GUARDED_BY(values_mu_);
  SnapshotVersion snapshot_version_ ABSL_GUARDED_BY(values_mu_);
};

absl::Status FileStore::Load() {
  std::vector<int64_t> numbers;
  absl::MutexLock lock(&mu_);
  absl::MutexLock values_lock(&values_mu_);
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(options_.folder, error)) {
    const std::string name = file.path().filename().string();
    absl::string_view rest = name;
    int64_t number = 0;
    if (absl::StrContains(name, ".tmp.")) {
      std::error_code ignored;  // a write that a crash interrupted
      std::filesystem::remove(file.path(), ignored);
    } else if (IsSegment(name, number)) {
      numbers.push_back(number);
    } else if (absl::ConsumePrefix(&rest, kValuePrefix)) {
      ASSIGN_OR_RETURN(Unsealed value, Unseal("value", file.path().string()));
      values_[std::string(rest)] = {std::move(value.rest), value.a};
    } else if (name == kSnapshot) {
      ASSIGN_OR_RETURN(const Unsealed snapshot, Unseal("snapshot", file.path().string()));
      snapshot_version_ = {snapshot.a, snapshot.b};
    }
  }
  if (error) return absl::UnavailableError(absl::StrCat("cannot list ", options_.folder, ": ", error.message()));
  return LoadSegments(numbers);
}

absl::Status FileStore::LoadSegments(const std::vector<int64_t>& numbers) {
  for (const int64_t number : numbers) segments_[number];
  for (auto& [number, segment] : segments_) {
    const bool newest = number == segments_.rbegin()->first;
    const int64_t n = number;
    const auto visit = [this, n](RecordType type, absl::string_view head, const SegmentFile::Place& place) {
      mu_.AssertHeld();
      return LoadRecord(n, type, head, place);
    };
    ASSIGN_OR_RETURN(segment.file, SegmentFile::Open(SegmentPath(number), newest, visit));
  }
  if (segments_.empty()) {
    ASSIGN_OR_RETURN(segments_[1].file, SegmentFile::Create(SegmentPath(1)));
  }
  for (const auto& [key, entry] : chunks_) log_.Append(entry.info);
  DeleteEmptySegments();
  return absl::OkStatus();
}

absl::Status FileStore::LoadRecord(int64_t number, RecordType type, absl::string_view head, const SegmentFile::Place& place) {
  if (type == RecordType::kEvict) {
    ASSIGN_OR_RETURN(const ChunkKey key, ParseKeyText(head));
    const auto chunk = chunks_.find(key);
    if (chunk == chunks_.end()) return absl::OkStatus();  // of a segment that is gone
    --segments_[chunk->second.segment].live;
    chunks_.erase(chunk);
    return absl::OkStatus();
  }
  const std::pair<absl::string_view, absl::string_view> parts = absl::StrSplit(head, absl::MaxSplits('\n', 1));
  ASSIGN_OR_RETURN(const ChunkInfo info, ParseInfoText(parts.first));
  if (info.payload_bytes != place.bytes) return absl::DataLossError("size of a chunk");
  const bool is_new = chunks_.emplace(info.key, Entry{info, std::string(parts.second), number, place, 0}).second;
  if (!is_new) return absl::DataLossError("a chunk occurs twice");
  ++segments_[number].live;
  return absl::OkStatus();
}

absl::Status FileStore::MakeRoom() {
  while (segments_.rbegin()->second.file->Full(options_.segment_bytes)) {
    RETURN_IF_ERROR(AwaitSync(written_));
    if (syncing_) {
      synced_changed_.Wait(&mu_);
    } else if (segments_.rbegin()->second.file->Full(options_.segment_bytes)) {  // mu_ was given up meanwhile
      const int64_t number = segments_.rbegin()->first + 1;
      ASSIGN_OR_RETURN(auto file, SegmentFile::Create(SegmentPath(number)));
      segments_[number].file = std::move(file);
    }
  }
  return absl::OkStatus();
}

absl::Status FileStore::AwaitSync(int64_t record) {
  while (synced_ < record) {
    RETURN_IF_ERROR(failed_);
    if (syncing_) {
      synced_changed_.Wait(&mu_);
      continue;
    }
    syncing_ = true;
    const int64_t upto = written_;
    const std::shared_ptr<SegmentFile> file = segments_.rbegin()->second.file;
    mu_.Unlock();
    const absl::Status status = file->Sync();
    mu_.Lock();
    syncing_ = false;
    if (status.ok()) {
      synced_ = upto;
    } else {
      failed_ = status;
    }
    synced_changed_.SignalAll();
  }
  return absl::OkStatus();
}

absl::Status FileStore::CompareWithStored(const Entry& entry, const Chunk& chunk) {
  if (InfoText(entry.info) != InfoText(chunk.info) || entry.run_id != chunk.run_id) return OtherContents(chunk.info.key);
  ASSIGN_OR_RETURN(const std::string payload, segments_[entry.segment].file->ReadPayload(entry.place));
  return payload == chunk.payload ? absl::OkStatus() : OtherContents(chunk.info.key);
}

absl::Status FileStore::Append(const Chunk& chunk) {
  RETURN_IF_ERROR(CheckChunk(chunk));
  absl::MutexLock lock(&mu_);
  RETURN_IF_ERROR(failed_);
  RETURN_IF_ERROR(MakeRoom());
  const auto stored = chunks_.find(chunk.info.key);
  if (stored != chunks_.end()) {
    RETURN_IF_ERROR(CompareWithStored(stored->second, chunk));
    return AwaitSync(stored->second.record);
  }
  auto& [number, segment] = *segments_.rbegin();
  const std::string head = absl::StrCat(InfoText(chunk.info), "\n", chunk.run_id);
  ASSIGN_OR_RETURN(const SegmentFile::Place place, segment.file->Append(RecordType::kAppend, head, chunk.payload));
  const int64_t record = ++written_;
  ++segment.live;
  chunks_.emplace(chunk.info.key, Entry{chunk.info, chunk.run_id, number, place, record});
  log_.Append(chunk.info);
  return AwaitSync(record);
}

absl::StatusOr<std::vector<std::optional<Chunk>>> FileStore::Read(absl::Span<const ChunkKey> keys) {
  struct Found {
    Entry entry;
    std::shared_ptr<SegmentFile> file;  // readable even after its segment was deleted
  };
  std::vector<std::optional<Found>> found;
  {
    absl::MutexLock lock(&mu_);
    for (const ChunkKey& key : keys) {
      const auto entry = chunks_.find(key);
      found.emplace_back();
      if (entry != chunks_.end()) found.back() = Found{entry->second, segments_[entry->second.segment].file};
    }
  }
  std::vector<std::optional<Chunk>> chunks;
  for (std::optional<Found>& f : found) {
    chunks.emplace_back();
    if (!f.has_value()) continue;
    ASSIGN_OR_RETURN(std::string payload, f->file->ReadPayload(f->entry.place));
    chunks.back() = Chunk{std::move(f->entry.run_id), f->entry.info, std::move(payload)};
  }
  return chunks;
}

void FileStore::Remove(std::map<ChunkKey, Entry>::iterator entry) {
  --segments_[entry->second.segment].live;
  log_.Evict(entry->first);
  chunks_.erase(entry);
}

// Evictions are not synced: one that a power failure undoes is simply decided again. The same holds on a full disk, where
// the record cannot be written but whole segments still go.
absl::Status FileStore::Evict(absl::Span<const ChunkKey> keys) {
  absl::MutexLock lock(&mu_);
  absl::Status written;
  for (const ChunkKey& key : keys) {
    const auto entry = chunks_.find(key);
    if (entry == chunks_.end()) continue;
    if (written.ok()) {
      written = segments_.rbegin()->second.file->Append(RecordType::kEvict, KeyText(key), "").status();
      if (written.ok()) ++written_;
    }
    Remove(entry);
  }
  if (!written.ok()) LogWarning("replay cannot note evictions, they may be undone at the next start: {}", written.ToString());
  DeleteEmptySegments();
  return absl::OkStatus();
}

// Only from the front: a later segment may hold the evictions of an earlier one's chunks.
void FileStore::DeleteEmptySegments() {
  while (segments_.size() > 1 && segments_.begin()->second.live == 0) {
    const std::string path = segments_.begin()->second.file->path();
    if (unlink(path.c_str()) != 0) {
      LogWarning("replay cannot delete file={}: {}", path, std::strerror(errno));
      return;
    }
    segments_.erase(segments_.begin());
  }
}

absl::StatusOr<VersionedValue> FileStore::Get(const std::string& name) {
  RETURN_IF_ERROR(CheckName("name of a value", name));
  absl::MutexLock lock(&values_mu_);
  const auto value = values_.find(name);
  return value == values_.end() ? VersionedValue{} : value->second;
}

absl::Status FileStore::CompareAndSet(const std::string& name, int64_t expected_version, const std::string& value) {
  RETURN_IF_ERROR(CheckName("name of a value", name));
  absl::MutexLock lock(&values_mu_);
  VersionedValue& kept = values_[name];
  if (kept.version != expected_version) {
    return absl::AbortedError(absl::StrCat("value '", name, "' has version ", kept.version, ", not ", expected_version));
  }
  const int64_t version = NextVersion(expected_version, value);
  RETURN_IF_ERROR(WriteFileAtomically(ValuePath(name), Seal("value", version, 0, value)));
  kept = {value, version};
  return absl::OkStatus();
}

absl::Status FileStore::PutSnapshot(const Snapshot& snapshot) {
  absl::MutexLock lock(&values_mu_);
  if (snapshot.version <= snapshot_version_) return absl::OkStatus();
  RETURN_IF_ERROR(WriteFileAtomically(
      SnapshotPath(), Seal("snapshot", snapshot.version.generation, snapshot.version.counter, snapshot.file)));
  snapshot_version_ = snapshot.version;
  return absl::OkStatus();
}

absl::StatusOr<Store::Snapshot> FileStore::GetSnapshot() {
  absl::MutexLock lock(&values_mu_);
  if (snapshot_version_ == SnapshotVersion{}) return absl::NotFoundError("no snapshot yet");
  ASSIGN_OR_RETURN(Unsealed snapshot, Unseal("snapshot", SnapshotPath()));
  return Snapshot{{snapshot.a, snapshot.b}, std::move(snapshot.rest)};
}

// Makes the file that tells the format, or checks it.
absl::Status CheckFormat(const std::string& folder) {
  const std::string path = absl::StrCat(folder, "/", kFormatFile);
  const absl::StatusOr<std::string> format = ReadFile(path);
  if (absl::IsNotFound(format.status())) return WriteFileAtomically(path, kFormat);
  RETURN_IF_ERROR(format.status());
  if (*format == kFormat) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(path, ": this version reads '", absl::string_view(kFormat, sizeof(kFormat) - 2),
                                                    "', the folder was made by another one"));
}

// Holds the folder for this process while the descriptor is open.
absl::StatusOr<int> Lock(const std::string& folder) {
  const std::string path = absl::StrCat(folder, "/", kLockFile);
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0) return absl::UnavailableError(absl::StrCat("cannot open ", path, ": ", std::strerror(errno)));
  struct stat locked {}, there {};
  const bool held = flock(fd, LOCK_EX | LOCK_NB) == 0;
  // A file that was deleted before we had it holds nobody off.
  if (held && fstat(fd, &locked) == 0 && stat(path.c_str(), &there) == 0 && locked.st_ino == there.st_ino) return fd;
  close(fd);
  return absl::FailedPreconditionError(absl::StrCat("replay data in ", folder, " is open in another process"));
}

bool Exists(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::exists(path, ignored);
}

// The segments in the folder, by number.
absl::StatusOr<std::map<int64_t, std::string>> Segments(const std::string& folder) {
  std::map<int64_t, std::string> segments;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(folder, error)) {
    int64_t number = 0;
    if (IsSegment(file.path().filename().string(), number)) segments[number] = file.path().string();
  }
  if (error) return absl::UnavailableError(absl::StrCat("cannot list ", folder, ": ", error.message()));
  return segments;
}

// Without the lock: a segment may go away meanwhile, and the newest may end in the middle of a record.
absl::Status Count(const std::string& folder, DataSetSummary& summary) {
  ASSIGN_OR_RETURN(const auto segments, Segments(folder));
  std::map<ChunkKey, int64_t> bytes;
  absl::Status status;
  for (const auto& [number, path] : segments) {
    const auto visit = [&bytes](RecordType type, absl::string_view head, const SegmentFile::Place& place) {
      if (type == RecordType::kEvict) {
        const absl::StatusOr<ChunkKey> key = ParseKeyText(head);
        if (key.ok()) bytes.erase(*key);
        return key.status();
      }
      const absl::StatusOr<ChunkInfo> info = ParseInfoText(head.substr(0, head.find('\n')));
      if (info.ok()) bytes[info->key] = place.bytes;
      return info.status();
    };
    status = SegmentFile::Open(path, /*newest=*/false, visit).status();
    const bool newest = number == segments.rbegin()->first;
    const bool torn = newest && (absl::IsDataLoss(status) || absl::IsOutOfRange(status));
    if (torn || !Exists(path)) status = absl::OkStatus();
    if (!status.ok()) break;
  }
  for (const auto& [key, size] : bytes) summary.bytes += size;
  summary.chunks = static_cast<int64_t>(bytes.size());
  return status;
}

// The files that the store makes, other than those by which a data set is known and locked.
bool IsContents(absl::string_view name) {
  return absl::StartsWith(name, kSegmentPrefix) || absl::StartsWith(name, kValuePrefix) || name == kSnapshot ||
         absl::StrContains(name, ".tmp.");
}

absl::Status RemoveFile(const std::filesystem::path& path) {
  std::error_code error;
  std::filesystem::remove(path, error);
  return error ? absl::UnavailableError(absl::StrCat("cannot delete ", path.string(), ": ", error.message())) : absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Store>> OpenFileStore(const FileStoreOptions& options, Clock& clock) {
  RETURN_IF_ERROR(MakeDirectory(options.folder));
  ASSIGN_OR_RETURN(const int lock_fd, Lock(options.folder));
  auto store = std::make_unique<FileStore>(options, lock_fd, clock);
  RETURN_IF_ERROR(CheckFormat(options.folder));
  RETURN_IF_ERROR(store->Load());
  return store;
}

absl::StatusOr<std::vector<DataSetSummary>> ListFileDataSets(const std::string& parent) {
  std::vector<DataSetSummary> summaries;
  std::error_code error;
  for (const auto& folder : std::filesystem::directory_iterator(parent, error)) {
    if (!Exists(folder.path() / kFormatFile)) continue;
    DataSetSummary summary{folder.path().filename().string()};
    const absl::Status status = Count(folder.path().string(), summary);
    if (!status.ok()) LogWarning("cannot count data set={}: {}", summary.run, status.ToString());
    summaries.push_back(std::move(summary));
  }
  if (error) return absl::NotFoundError(absl::StrCat("cannot list ", parent, ": ", error.message()));
  std::sort(summaries.begin(), summaries.end(), [](const auto& a, const auto& b) { return a.run < b.run; });
  return summaries;
}

// The format file goes after all contents: what was interrupted can be done again.
absl::Status DeleteFileDataSet(const std::string& folder) {
  const std::filesystem::path path(folder);
  if (!Exists(path / kFormatFile)) return absl::NotFoundError(absl::StrCat("there is no data set in ", folder));
  ASSIGN_OR_RETURN(const int lock_fd, Lock(folder));
  absl::Cleanup closer = [lock_fd] { close(lock_fd); };
  RETURN_IF_ERROR(CheckFormat(folder));
  std::vector<std::filesystem::path> contents;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(path, error)) {
    if (IsContents(file.path().filename().string())) contents.push_back(file.path());
  }
  if (error) return absl::UnavailableError(absl::StrCat("cannot list ", folder, ": ", error.message()));
  contents.push_back(path / kFormatFile);
  contents.push_back(path / kLockFile);
  for (const std::filesystem::path& file : contents) RETURN_IF_ERROR(RemoveFile(file));
  std::filesystem::remove(path, error);  // not empty: there are files of others in it
  return absl::OkStatus();
}

}  // namespace orrery
