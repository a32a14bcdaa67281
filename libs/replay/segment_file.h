// The append-only files of the file store: records with lengths and checksums (docs/replay_storage.md).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace orrery {

// One segment. Append is for one thread at a time; ReadPayload and Sync may run beside it. The file is closed with the object.
class SegmentFile {
 public:
  enum class RecordType : uint8_t { kAppend = 1, kEvict = 2 };
  // Where a record's payload lies.
  struct Place {
    int64_t offset = 0;
    uint32_t bytes = 0;
    uint32_t checksum = 0;
  };
  // `head` is the small text before the payload.
  using Visitor = std::function<absl::Status(RecordType type, absl::string_view head, const Place& payload)>;

  // Makes an empty segment; it is on the disk, as is its name, when this returns.
  static absl::StatusOr<std::unique_ptr<SegmentFile>> Create(const std::string& path);
  // Opens a segment and visits its records in order. In the newest segment an incomplete or damaged end is cut off, with a
  // copy kept in PATH.cut; elsewhere it is DATA_LOSS, and payloads are checked only when read.
  static absl::StatusOr<std::unique_ptr<SegmentFile>> Open(const std::string& path, bool newest, const Visitor& visit);

  ~SegmentFile();
  SegmentFile(const SegmentFile&) = delete;
  SegmentFile& operator=(const SegmentFile&) = delete;

  // Writes a record; not synced. On failure (RESOURCE_EXHAUSTED: disk full) the file is as it was, or else every later
  // call fails too.
  absl::StatusOr<Place> Append(RecordType type, absl::string_view head, absl::string_view payload);
  absl::StatusOr<std::string> ReadPayload(const Place& place) const;
  absl::Status Sync() const;
  // Whether it has records and at least `bytes` bytes.
  bool Full(int64_t bytes) const;
  const std::string& path() const { return path_; }

 private:
  SegmentFile(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}
  absl::StatusOr<int64_t> Scan(bool check_payloads, const Visitor& visit) const;
  absl::Status CutOff(int64_t good);

  const std::string path_;
  const int fd_;
  int64_t size_ = 0;
  bool broken_ = false;
};

}  // namespace orrery
