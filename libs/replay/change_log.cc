#include "libs/replay/change_log.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "libs/base/status.h"
#include "libs/replay/chunk_text.h"

namespace orrery {

ChangeLog::ChangeLog(size_t capacity) : capacity_(std::max<size_t>(1, capacity)), generation_(RandomIdentity()) {}

void ChangeLog::Add(Change::Kind kind, const ChunkInfo& info) {
  log_.push_back({kind, info});
  if (log_.size() > capacity_) {
    log_.pop_front();
    ++first_;
  }
  changed_.SignalAll();
}

void ChangeLog::Append(const ChunkInfo& info) {
  absl::MutexLock lock(&mu_);
  live_[info.key] = info;
  Add(Change::Kind::kAppend, info);
}

void ChangeLog::Evict(const ChunkKey& key) {
  absl::MutexLock lock(&mu_);
  const auto chunk = live_.find(key);
  if (chunk == live_.end()) return;
  Add(Change::Kind::kEvict, chunk->second);
  live_.erase(chunk);
}

absl::StatusOr<ChangeLog::Position> ChangeLog::ParseCursor(const std::string& cursor) const {
  Position position;
  if (cursor.empty()) {
    position.next = end();
    position.listed = ChunkKey{std::numeric_limits<int64_t>::min(), 0};
    return position;
  }
  const std::vector<absl::string_view> parts = absl::StrSplit(cursor, ' ');
  const bool parsed = (parts.size() == 2 || parts.size() == 3) && parts[0] == generation_ &&
                      absl::SimpleAtoi(parts[1], &position.next) && position.next <= end();
  if (!parsed) return absl::OutOfRangeError("cursor of another data set; begin without one");
  if (position.next < first_) return absl::OutOfRangeError("cursor is too old; begin without one");
  if (parts.size() == 3) {
    const absl::StatusOr<ChunkKey> key = ParseKeyText(parts[2]);
    if (!key.ok()) return absl::OutOfRangeError("not a cursor; begin without one");
    position.listed = *key;
  }
  return position;
}

absl::StatusOr<ChangeBatch> ChangeLog::Read(const std::string& cursor, int max, absl::Duration wait) {
  const absl::Time deadline = absl::Now() + (cursor.empty() ? absl::ZeroDuration() : wait);
  const size_t limit = std::max(1, max);
  absl::MutexLock lock(&mu_);
  ASSIGN_OR_RETURN(Position position, ParseCursor(cursor));
  ChangeBatch batch;
  if (position.listed.has_value()) {
    auto chunk = live_.upper_bound(*position.listed);
    for (; chunk != live_.end() && batch.changes.size() < limit; ++chunk) {
      batch.changes.push_back({Change::Kind::kAppend, chunk->second});
      position.listed = chunk->first;
    }
    if (chunk == live_.end()) position.listed.reset();
  } else {
    while (position.next == end() && !changed_.WaitWithDeadline(&mu_, deadline)) {
    }
    if (position.next < first_) return absl::OutOfRangeError("cursor is too old; begin without one");
    for (; position.next < end() && batch.changes.size() < limit; ++position.next) {
      batch.changes.push_back(log_[position.next - first_]);
    }
  }
  batch.caught_up = !position.listed.has_value() && position.next == end();
  batch.cursor = absl::StrCat(generation_, " ", position.next);
  if (position.listed.has_value()) absl::StrAppend(&batch.cursor, " ", KeyText(*position.listed));
  return batch;
}

}  // namespace orrery
