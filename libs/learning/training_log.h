// The learning curve on disk: a CSV file for people and scripts, and TensorBoard events.
#pragma once

#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace orrery {

// Appends rows of numbers to a file; the first column is a step that never falls. Not thread-safe. Every row is in the
// kernel when Add returns.
class CsvLog {
 public:
  // Opens or makes the file. In one that is there, rows after `last_step` (they will be made again) and a row cut short
  // by a crash are dropped. FAILED_PRECONDITION: its header is another one.
  static absl::StatusOr<std::unique_ptr<CsvLog>> Open(const std::string& path, std::vector<std::string> columns,
                                                      int64_t last_step);
  ~CsvLog();
  CsvLog(const CsvLog&) = delete;
  CsvLog& operator=(const CsvLog&) = delete;
  // Columns by name; one without a value stays empty, a value without a column is left out.
  absl::Status Add(int64_t step, const std::map<std::string, double>& values);

 private:
  CsvLog(std::string path, std::vector<std::string> columns, std::FILE* file)
      : path_(std::move(path)), columns_(std::move(columns)), file_(file) {}

  const std::string path_;
  const std::vector<std::string> columns_;  // behind the step
  std::FILE* const file_;
};

// Writes scalars to one TensorBoard event file. Not thread-safe.
class EventLog {
 public:
  // Makes events.out.tfevents.<seconds>.orrery.<pid> in `folder`. TensorBoard drops what older files there say about
  // steps from `first_step` on.
  static absl::StatusOr<std::unique_ptr<EventLog>> Create(const std::string& folder, int64_t first_step, absl::Time now);
  ~EventLog();
  EventLog(const EventLog&) = delete;
  EventLog& operator=(const EventLog&) = delete;
  absl::Status Add(int64_t step, absl::Time now, const std::map<std::string, double>& values);

 private:
  EventLog(std::string path, std::FILE* file) : path_(std::move(path)), file_(file) {}
  absl::Status Write(absl::string_view event);

  const std::string path_;
  std::FILE* const file_;
};

// CRC-32C (Castagnoli) of `data`.
uint32_t Crc32c(absl::string_view data);
// One TFRecord: length, masked CRC of the length, data, masked CRC of the data.
std::string FrameRecord(absl::string_view data);

}  // namespace orrery
