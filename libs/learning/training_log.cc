#include "libs/learning/training_log.h"

#include <unistd.h>

#include <algorithm>
#include <boost/crc.hpp>
#include <cerrno>
#include <cstring>
#include <utility>

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/wire_format_lite.h>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "libs/base/file.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

using google::protobuf::io::CodedOutputStream;
using google::protobuf::io::StringOutputStream;
using WireFormat = google::protobuf::internal::WireFormatLite;

constexpr char kStep[] = "step";

absl::Status Errno(absl::string_view what, const std::string& path) {
  const std::string message = absl::StrCat(what, " ", path, ": ", std::strerror(errno));
  return errno == ENOSPC ? absl::ResourceExhaustedError(message) : absl::UnknownError(message);
}

absl::Status AppendTo(std::FILE* file, const std::string& path, absl::string_view bytes) {
  if (std::fwrite(bytes.data(), 1, bytes.size(), file) != bytes.size() || std::fflush(file) != 0) {
    std::clearerr(file);
    return Errno("cannot write", path);
  }
  return absl::OkStatus();
}

// The rows of an older file that stay.
absl::StatusOr<std::string> KeptRows(const std::string& path, const std::string& contents, const std::string& header,
                                     int64_t last_step) {
  std::string kept = header;
  bool first = true;
  for (absl::string_view rest = contents; rest.find('\n') != absl::string_view::npos;) {
    const absl::string_view line = rest.substr(0, rest.find('\n') + 1);
    rest.remove_prefix(line.size());
    if (first && line != header) {
      return absl::FailedPreconditionError(absl::StrCat(path, " has the columns ", line.substr(0, line.size() - 1),
                                                        ", expected ", header.substr(0, header.size() - 1)));
    }
    int64_t step = 0;
    // A row that a full disk cut short has another number of columns.
    const bool is_row = std::count(line.begin(), line.end(), ',') == std::count(header.begin(), header.end(), ',') &&
                        !first && absl::SimpleAtoi(line.substr(0, line.find(',')), &step) && step <= last_step;
    if (is_row) absl::StrAppend(&kept, line);
    first = false;
  }
  return kept;
}

std::string LittleEndian(uint64_t value, int bytes) {
  std::string out;
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<char>(value >> (8 * i) & 0xff));
  return out;
}

uint32_t MaskedCrc(absl::string_view data) {
  const uint32_t crc = Crc32c(data);
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

// tensorflow.Event: wall_time = 1 (double), step = 2 (int64), and one of file_version = 3, summary = 5, session_log = 7.
std::string Event(absl::Time now, int64_t step, int field, absl::string_view payload) {
  std::string out;
  {
    StringOutputStream stream(&out);
    CodedOutputStream coded(&stream);
    WireFormat::WriteDouble(1, absl::ToUnixMicros(now) * 1e-6, &coded);
    WireFormat::WriteInt64(2, step, &coded);
    WireFormat::WriteBytes(field, std::string(payload), &coded);
  }
  return out;
}

// tensorflow.Summary: value = 1 { tag = 1, simple_value = 2 }.
std::string Summary(const std::map<std::string, double>& values) {
  std::string out;
  StringOutputStream stream(&out);
  CodedOutputStream coded(&stream);
  for (const auto& [tag, number] : values) {
    std::string value;
    {
      StringOutputStream value_stream(&value);
      CodedOutputStream value_coded(&value_stream);
      WireFormat::WriteBytes(1, tag, &value_coded);
      WireFormat::WriteFloat(2, static_cast<float>(number), &value_coded);
    }
    WireFormat::WriteBytes(1, value, &coded);
  }
  coded.Trim();
  return out;
}

// tensorflow.SessionLog: status = 1, START = 1.
std::string SessionStart() { return std::string("\x08\x01", 2); }

}  // namespace

absl::StatusOr<std::unique_ptr<CsvLog>> CsvLog::Open(const std::string& path, std::vector<std::string> columns,
                                                     int64_t last_step) {
  const std::string header = absl::StrCat(kStep, ",", absl::StrJoin(columns, ","), "\n");
  std::string kept = header;
  absl::StatusOr<std::string> present = ReadFile(path);
  if (present.ok()) {
    ASSIGN_OR_RETURN(kept, KeptRows(path, *present, header, last_step));
  } else if (!absl::IsNotFound(present.status())) {
    return present.status();
  }
  if (!present.ok() || kept != *present) RETURN_IF_ERROR(WriteFileAtomically(path, kept));
  std::FILE* file = std::fopen(path.c_str(), "ae");
  if (file == nullptr) return Errno("cannot open", path);
  return std::unique_ptr<CsvLog>(new CsvLog(path, std::move(columns), file));
}

CsvLog::~CsvLog() { std::fclose(file_); }

absl::Status CsvLog::Add(int64_t step, const std::map<std::string, double>& values) {
  std::string row = absl::StrCat(step);
  for (const std::string& column : columns_) {
    const auto found = values.find(column);
    absl::StrAppend(&row, ",");
    if (found != values.end()) absl::StrAppend(&row, found->second);
  }
  row.push_back('\n');
  return AppendTo(file_, path_, row);
}

absl::StatusOr<std::unique_ptr<EventLog>> EventLog::Create(const std::string& folder, int64_t first_step,
                                                           absl::Time now) {
  RETURN_IF_ERROR(MakeDirectory(folder));
  const std::string path =
      absl::StrCat(folder, "/events.out.tfevents.", absl::ToUnixSeconds(now), ".orrery.", getpid());
  std::FILE* file = std::fopen(path.c_str(), "ae");
  if (file == nullptr) return Errno("cannot open", path);
  auto log = std::unique_ptr<EventLog>(new EventLog(path, file));
  RETURN_IF_ERROR(log->Write(Event(now, 0, 3, "brain.Event:2")));
  RETURN_IF_ERROR(log->Write(Event(now, first_step, 7, SessionStart())));
  return log;
}

EventLog::~EventLog() { std::fclose(file_); }

absl::Status EventLog::Add(int64_t step, absl::Time now, const std::map<std::string, double>& values) {
  return Write(Event(now, step, 5, Summary(values)));
}

absl::Status EventLog::Write(absl::string_view event) { return AppendTo(file_, path_, FrameRecord(event)); }

uint32_t Crc32c(absl::string_view data) {
  boost::crc_optimal<32, 0x1EDC6F41, 0xFFFFFFFF, 0xFFFFFFFF, true, true> crc;
  crc.process_bytes(data.data(), data.size());
  return static_cast<uint32_t>(crc.checksum());
}

std::string FrameRecord(absl::string_view data) {
  const std::string length = LittleEndian(data.size(), 8);
  return absl::StrCat(length, LittleEndian(MaskedCrc(length), 4), data, LittleEndian(MaskedCrc(data), 4));
}

}  // namespace orrery
