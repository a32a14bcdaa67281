#include "libs/replay/segment_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <limits>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "libs/base/file.h"
#include "libs/base/log.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

// A file is "ORSG", u32 version, records. A record is this header, the head and the payload; little-endian.
struct RecordHeader {
  uint32_t checksum = 0;  // of the rest of this header and of the head
  uint8_t type = 0;
  uint8_t unused[3] = {};
  uint32_t head_bytes = 0;
  uint32_t payload_bytes = 0;
  uint32_t payload_checksum = 0;
};
static_assert(sizeof(RecordHeader) == 20 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

constexpr char kMagic[] = {'O', 'R', 'S', 'G'};
constexpr uint32_t kVersion = 1;
constexpr int64_t kFileHeaderBytes = 8;
constexpr uint32_t kMaxHeadBytes = 4096;

absl::Status Errno(absl::string_view what, const std::string& path) {
  const std::string message = absl::StrCat(what, " ", path, ": ", std::strerror(errno));
  if (errno == ENOSPC || errno == EDQUOT) return absl::ResourceExhaustedError(message);
  if (errno == EIO) return absl::DataLossError(message);
  return absl::UnavailableError(message);
}

absl::Status WriteAll(int fd, absl::string_view data, int64_t offset, const std::string& path) {
  while (!data.empty()) {
    const ssize_t n = pwrite(fd, data.data(), data.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Errno("cannot write", path);
    data.remove_prefix(n);
    offset += n;
  }
  return absl::OkStatus();
}

// Exactly `bytes` from `offset`; OUT_OF_RANGE when the file ends before.
absl::StatusOr<std::string> ReadExactly(int fd, int64_t offset, size_t bytes, const std::string& path) {
  std::string data(bytes, '\0');
  size_t done = 0;
  while (done < bytes) {
    const ssize_t n = pread(fd, data.data() + done, bytes - done, offset + static_cast<int64_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Errno("cannot read", path);
    if (n == 0) return absl::OutOfRangeError(absl::StrCat(path, " ends early"));
    done += n;
  }
  return data;
}

absl::Status SyncFolderOf(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  const int fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return Errno("cannot open folder", folder);
  absl::Cleanup closer = [fd] { close(fd); };
  return fsync(fd) == 0 ? absl::OkStatus() : Errno("cannot sync folder", folder);
}

std::string FileHeader() {
  std::string header(kMagic, sizeof(kMagic));
  header.append(reinterpret_cast<const char*>(&kVersion), sizeof(kVersion));
  return header;
}

absl::string_view AsBytes(const RecordHeader& header) {
  return {reinterpret_cast<const char*>(&header), sizeof(header)};
}

uint32_t HeaderChecksum(const RecordHeader& header, absl::string_view head) {
  return Checksum(absl::StrCat(AsBytes(header).substr(sizeof(header.checksum)), head));
}

absl::Status Damaged(const std::string& path, int64_t offset, absl::string_view what) {
  return absl::DataLossError(absl::StrCat(path, " is damaged at byte ", offset, ": ", what));
}

}  // namespace

SegmentFile::~SegmentFile() { close(fd_); }

absl::StatusOr<std::unique_ptr<SegmentFile>> SegmentFile::Create(const std::string& path) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return Errno("cannot create", path);
  std::unique_ptr<SegmentFile> segment(new SegmentFile(path, fd));
  RETURN_IF_ERROR(WriteAll(fd, FileHeader(), 0, path));
  segment->size_ = kFileHeaderBytes;
  RETURN_IF_ERROR(segment->Sync());
  RETURN_IF_ERROR(SyncFolderOf(path));
  return segment;
}

absl::StatusOr<std::unique_ptr<SegmentFile>> SegmentFile::Open(const std::string& path, bool newest, const Visitor& visit) {
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return Errno("cannot open", path);
  std::unique_ptr<SegmentFile> segment(new SegmentFile(path, fd));
  struct stat info {};
  if (fstat(fd, &info) != 0) return Errno("cannot look at", path);
  segment->size_ = info.st_size;
  // A crash while the file was made: nothing in it was acknowledged.
  if (newest && segment->size_ < kFileHeaderBytes) return Create(path);
  ASSIGN_OR_RETURN(const std::string header, ReadExactly(fd, 0, kFileHeaderBytes, path));
  if (std::memcmp(header.data(), kMagic, sizeof(kMagic)) != 0) return Damaged(path, 0, "not a segment file");
  if (header != FileHeader()) {
    return absl::FailedPreconditionError(absl::StrCat(path, " was made by another version, expected version ", kVersion));
  }
  ASSIGN_OR_RETURN(const int64_t good, segment->Scan(newest, visit));
  if (good < segment->size_) {
    if (!newest) return Damaged(path, good, "not a record");
    RETURN_IF_ERROR(segment->CutOff(good));
  }
  return segment;
}

// Returns where the last good record ends.
absl::StatusOr<int64_t> SegmentFile::Scan(bool check_payloads, const Visitor& visit) const {
  int64_t offset = kFileHeaderBytes;
  while (size_ - offset >= static_cast<int64_t>(sizeof(RecordHeader))) {
    ASSIGN_OR_RETURN(const std::string fixed, ReadExactly(fd_, offset, sizeof(RecordHeader), path_));
    RecordHeader header;
    std::memcpy(&header, fixed.data(), sizeof(header));
    const int64_t head_at = offset + static_cast<int64_t>(sizeof(header));
    if (header.head_bytes > kMaxHeadBytes || size_ - head_at < int64_t{header.head_bytes} + header.payload_bytes) break;
    ASSIGN_OR_RETURN(const std::string head, ReadExactly(fd_, head_at, header.head_bytes, path_));
    if (HeaderChecksum(header, head) != header.checksum) break;
    if (header.type != static_cast<uint8_t>(RecordType::kAppend) && header.type != static_cast<uint8_t>(RecordType::kEvict)) {
      break;
    }
    const Place place{head_at + header.head_bytes, header.payload_bytes, header.payload_checksum};
    if (check_payloads) {
      ASSIGN_OR_RETURN(const std::string payload, ReadExactly(fd_, place.offset, place.bytes, path_));
      if (Checksum(payload) != place.checksum) break;
    }
    RETURN_IF_ERROR(Annotate(visit(static_cast<RecordType>(header.type), head, place), absl::StrCat(path_, " at byte ", offset)));
    offset = place.offset + place.bytes;
  }
  return offset;
}

absl::Status SegmentFile::CutOff(int64_t good) {
  const std::string kept = path_ + ".cut";
  LogWarning("replay file={} ends with an incomplete record; bytes={} cut off, copy={}", path_, size_ - good, kept);
  ASSIGN_OR_RETURN(const std::string tail, ReadExactly(fd_, good, size_ - good, path_));
  RETURN_IF_ERROR(WriteFileAtomically(kept, tail));
  if (ftruncate(fd_, good) != 0) return Errno("cannot cut", path_);
  size_ = good;
  return Sync();
}

absl::StatusOr<SegmentFile::Place> SegmentFile::Append(RecordType type, absl::string_view head, absl::string_view payload) {
  if (broken_) return absl::UnavailableError(absl::StrCat(path_, ": an earlier write failed half-way"));
  if (head.size() > kMaxHeadBytes || payload.size() > std::numeric_limits<uint32_t>::max()) {
    return absl::InvalidArgumentError(absl::StrCat("record of ", head.size(), " + ", payload.size(), " bytes is too large"));
  }
  RecordHeader header;
  header.type = static_cast<uint8_t>(type);
  header.head_bytes = static_cast<uint32_t>(head.size());
  header.payload_bytes = static_cast<uint32_t>(payload.size());
  header.payload_checksum = Checksum(payload);
  header.checksum = HeaderChecksum(header, head);
  const std::string front = absl::StrCat(AsBytes(header), head);
  const int64_t payload_at = size_ + static_cast<int64_t>(front.size());
  absl::Status status = WriteAll(fd_, front, size_, path_);
  if (status.ok()) status = WriteAll(fd_, payload, payload_at, path_);
  if (!status.ok()) {
    broken_ = ftruncate(fd_, size_) != 0;
    return status;
  }
  size_ = payload_at + static_cast<int64_t>(payload.size());
  return Place{payload_at, header.payload_bytes, header.payload_checksum};
}

absl::StatusOr<std::string> SegmentFile::ReadPayload(const Place& place) const {
  absl::StatusOr<std::string> payload = ReadExactly(fd_, place.offset, place.bytes, path_);
  if (absl::IsOutOfRange(payload.status())) return Damaged(path_, place.offset, "the file ends early");
  RETURN_IF_ERROR(payload.status());
  if (Checksum(*payload) != place.checksum) return Damaged(path_, place.offset, "checksum of a chunk");
  return payload;
}

bool SegmentFile::Full(int64_t bytes) const { return size_ > kFileHeaderBytes && size_ >= bytes; }

absl::Status SegmentFile::Sync() const {
  return fdatasync(fd_) == 0 ? absl::OkStatus() : Errno("cannot sync", path_);
}

}  // namespace orrery
