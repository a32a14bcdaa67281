#include "libs/replay/chunk_text.h"

#include <random>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"

namespace orrery {
namespace {

constexpr size_t kMaxRunIdBytes = 128;
constexpr size_t kMaxPayloadBytes = size_t{256} << 20;

bool ParseHash(absl::string_view text, uint64_t& value) {
  return text.size() == 16 && absl::SimpleHexAtoi(text, &value);
}

}  // namespace

std::string InfoText(const ChunkInfo& info) {
  return absl::StrFormat("%d %d %d %d %d %016x %d %d %.17g %d %d", info.key.episode_id, info.key.first_row, info.rows,
                         static_cast<int>(info.mode), static_cast<int>(info.end), info.specification_hash,
                         info.snapshot_version.generation, info.snapshot_version.counter, info.reward_sum,
                         info.payload_bytes, info.task);
}

absl::StatusOr<ChunkInfo> ParseInfoText(absl::string_view text) {
  const std::vector<absl::string_view> parts = absl::StrSplit(text, ' ');
  ChunkInfo info;
  int mode = 0, end = 0;
  if (parts.size() != 11 || !absl::SimpleAtoi(parts[0], &info.key.episode_id) ||
      !absl::SimpleAtoi(parts[1], &info.key.first_row) || !absl::SimpleAtoi(parts[2], &info.rows) ||
      !absl::SimpleAtoi(parts[3], &mode) || !absl::SimpleAtoi(parts[4], &end) ||
      !ParseHash(parts[5], info.specification_hash) ||
      !absl::SimpleAtoi(parts[6], &info.snapshot_version.generation) ||
      !absl::SimpleAtoi(parts[7], &info.snapshot_version.counter) || !absl::SimpleAtod(parts[8], &info.reward_sum) ||
      !absl::SimpleAtoi(parts[9], &info.payload_bytes) || !absl::SimpleAtoi(parts[10], &info.task) || mode < 1 || mode > 3 ||
      end < 1 || end > 3 || info.rows < 1 || info.task < 0) {
    return absl::DataLossError(absl::StrCat("damaged description of a chunk: '", absl::CHexEscape(text.substr(0, 200)), "'"));
  }
  info.mode = static_cast<EpisodeMode>(mode);
  info.end = static_cast<EpisodeEnd>(end);
  return info;
}

const char* Name(EpisodeMode mode) {
  switch (mode) {
    case EpisodeMode::kRandom: return "random";
    case EpisodeMode::kTrain: return "train";
    case EpisodeMode::kEvaluate: return "evaluate";
  }
  return "unknown";
}

const char* Name(EpisodeEnd end) {
  switch (end) {
    case EpisodeEnd::kContinues: return "open";
    case EpisodeEnd::kTerminated: return "terminated";
    case EpisodeEnd::kTruncated: return "truncated";
  }
  return "unknown";
}

std::string KeyText(const ChunkKey& key) { return absl::StrFormat("%016x:%016x", key.episode_id, key.first_row); }

absl::StatusOr<ChunkKey> ParseKeyText(absl::string_view text) {
  uint64_t episode = 0, row = 0;
  if (text.size() != 33 || text[16] != ':' || !ParseHash(text.substr(0, 16), episode) ||
      !ParseHash(text.substr(17), row)) {
    return absl::DataLossError(absl::StrCat("damaged key of a chunk: '", absl::CHexEscape(text.substr(0, 200)), "'"));
  }
  return ChunkKey{static_cast<int64_t>(episode), static_cast<int64_t>(row)};
}

absl::Status CheckChunk(const Chunk& chunk) {
  const ChunkInfo& info = chunk.info;
  const auto refuse = [](absl::string_view name, auto value, absl::string_view expected) {
    return absl::InvalidArgumentError(absl::StrCat("chunk: ", name, " is ", value, ", expected ", expected));
  };
  if (info.key.episode_id < 1) return refuse("episode_id", info.key.episode_id, "at least 1");
  if (info.key.first_row < 0) return refuse("first_row", info.key.first_row, "at least 0");
  if (info.rows < 1) return refuse("rows", info.rows, "at least 1");
  const int mode = static_cast<int>(info.mode), end = static_cast<int>(info.end);
  if (info.task < 0) return refuse("task", info.task, "at least 0");
  if (mode < 1 || mode > 3) return refuse("mode", mode, "1 to 3");
  if (end < 1 || end > 3) return refuse("end", end, "1 to 3");
  if (info.payload_bytes != static_cast<int64_t>(chunk.payload.size())) {
    return refuse("payload_bytes", info.payload_bytes, absl::StrCat("the payload's size, ", chunk.payload.size()));
  }
  if (chunk.payload.size() > kMaxPayloadBytes) {
    return refuse("the payload's size", chunk.payload.size(), absl::StrCat("at most ", kMaxPayloadBytes, " bytes"));
  }
  if (chunk.run_id.size() > kMaxRunIdBytes) {
    return refuse("run_id's size", chunk.run_id.size(), absl::StrCat("at most ", kMaxRunIdBytes, " bytes"));
  }
  return absl::OkStatus();
}

std::string Place(const ChunkKey& key) {
  return absl::StrCat("chunk of episode ", key.episode_id, " at row ", key.first_row);
}

absl::Status OtherContents(const ChunkKey& key) {
  return absl::AlreadyExistsError(absl::StrCat(Place(key), " is already stored with other contents"));
}

absl::Status CheckName(absl::string_view what, absl::string_view name) {
  bool ok = !name.empty() && name.size() <= 64 && name != "." && name != "..";
  for (const char c : name) ok = ok && (absl::ascii_isalnum(c) || c == '_' || c == '-' || c == '.');
  if (ok) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, " is '", absl::CHexEscape(name.substr(0, 80)),
                                                 "', expected 1 to 64 letters, digits, '_', '-' and '.'"));
}

std::string RandomIdentity() {
  std::random_device device;
  return absl::StrFormat("%08x%08x", device(), device());
}

}  // namespace orrery
