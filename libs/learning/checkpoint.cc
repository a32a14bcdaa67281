#include "libs/learning/checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "libs/base/file.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/tensors/safetensors.h"

namespace orrery {
namespace {

constexpr char kFormat[] = "orrery.checkpoint.format";
constexpr char kFormatVersion[] = "1";
constexpr char kUpdates[] = "orrery.updates";
constexpr char kGeneration[] = "orrery.generation";
constexpr char kSampler[] = "orrery.sampler";
constexpr char kExperiment[] = "orrery.experiment";
constexpr char kChecksum[] = "orrery.checksum";
constexpr char kNoChecksum[] = "00000000";  // stands in its place while the checksum is computed
constexpr size_t kChecksumDigits = 8;

constexpr absl::string_view kPrefix = "checkpoint-";
constexpr absl::string_view kSuffix = ".safetensors";
constexpr absl::string_view kDamaged = ".safetensors.damaged";  // set aside
constexpr absl::string_view kTemporary = ".safetensors.tmp.";    // WriteFileAtomically's

std::string Name(int64_t updates) { return absl::StrFormat("%s%012d%s", kPrefix, updates, kSuffix); }

// Where the digits of the checksum stand in the file. The quotes around the key keep it apart from any value, in which
// JSON would have escaped them.
std::optional<size_t> FindChecksum(absl::string_view file) {
  const std::string key = absl::StrCat("\"", kChecksum, "\"");
  const size_t found = file.find(key);
  if (found == absl::string_view::npos) return std::nullopt;
  const size_t quote = file.find('"', found + key.size());
  if (quote == absl::string_view::npos || file.size() - quote < kChecksumDigits + 2) return std::nullopt;
  return quote + 1;
}

absl::StatusOr<std::string> Get(const SafeTensors& contents, const std::string& key) {
  const auto found = contents.metadata.find(key);
  if (found == contents.metadata.end()) return absl::DataLossError(absl::StrCat("metadata entry ", key, " is missing"));
  return found->second;
}

absl::StatusOr<int64_t> GetNumber(const SafeTensors& contents, const std::string& key) {
  ASSIGN_OR_RETURN(const std::string text, Get(contents, key));
  int64_t value = 0;
  if (!absl::SimpleAtoi(text, &value) || value < 0) {
    return absl::DataLossError(absl::StrCat("metadata entry ", key, " is \"", text, "\", expected a number"));
  }
  return value;
}

// Names of checkpoints that end like this, oldest first, or of what interrupted writes left behind.
absl::StatusOr<std::vector<std::string>> List(const std::string& folder, absl::string_view ending = kSuffix) {
  std::error_code error;
  std::filesystem::directory_iterator entries(folder, error);
  if (error) return absl::UnknownError(absl::StrCat("cannot list ", folder, ": ", error.message()));
  std::vector<std::string> names;
  for (const auto& entry : entries) {
    const std::string name = entry.path().filename().string();
    if (!absl::StartsWith(name, kPrefix)) continue;
    if (ending == kTemporary ? absl::StrContains(name, ending) : absl::EndsWith(name, ending)) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

absl::StatusOr<std::string> SerializeCheckpoint(const Checkpoint& checkpoint) {
  SafeTensors contents;
  contents.tensors = checkpoint.tensors;
  contents.metadata = {{kFormat, kFormatVersion},
                       {kUpdates, absl::StrCat(checkpoint.updates)},
                       {kGeneration, absl::StrCat(checkpoint.generation)},
                       {kSampler, checkpoint.sampler},
                       {kExperiment, checkpoint.experiment},
                       {kChecksum, kNoChecksum}};
  ASSIGN_OR_RETURN(std::string file, SerializeSafeTensors(contents));
  const std::optional<size_t> position = FindChecksum(file);
  if (!position.has_value()) return absl::InternalError("the checkpoint's header has no place for its checksum");
  file.replace(*position, kChecksumDigits, absl::StrFormat("%08x", Checksum(file)));
  return file;
}

absl::StatusOr<Checkpoint> ParseCheckpoint(absl::string_view file) {
  const std::optional<size_t> position = FindChecksum(file);
  if (!position.has_value()) return absl::DataLossError("not a checkpoint: no checksum in its header");
  std::string unsigned_file(file);
  unsigned_file.replace(*position, kChecksumDigits, kNoChecksum);
  const std::string expected(file.substr(*position, kChecksumDigits));
  const std::string computed = absl::StrFormat("%08x", Checksum(unsigned_file));
  if (expected != computed) {
    return absl::DataLossError(absl::StrCat("checksum is ", computed, ", the file says ", expected));
  }
  ASSIGN_OR_RETURN(SafeTensors contents, ParseSafeTensors(file));
  ASSIGN_OR_RETURN(const std::string format, Get(contents, kFormat));
  if (format != kFormatVersion) {
    return absl::DataLossError(absl::StrCat("format ", format, " is not ", kFormatVersion));
  }
  Checkpoint checkpoint;
  ASSIGN_OR_RETURN(checkpoint.updates, GetNumber(contents, kUpdates));
  ASSIGN_OR_RETURN(checkpoint.generation, GetNumber(contents, kGeneration));
  ASSIGN_OR_RETURN(checkpoint.sampler, Get(contents, kSampler));
  ASSIGN_OR_RETURN(checkpoint.experiment, Get(contents, kExperiment));
  checkpoint.tensors = std::move(contents.tensors);
  return checkpoint;
}

absl::StatusOr<CheckpointFolder> CheckpointFolder::Open(const std::string& folder, int keep) {
  RETURN_IF_ERROR(MakeDirectory(folder));
  RETURN_IF_ERROR(List(folder).status());
  return CheckpointFolder(folder, keep);
}

void CheckpointFolder::RemoveTemporaryFiles() {
  if (std::exchange(removed_temporary_files_, true)) return;
  const absl::StatusOr<std::vector<std::string>> names = List(folder_, kTemporary);
  if (!names.ok()) return;
  for (const std::string& name : *names) {
    std::error_code ignored;
    std::filesystem::remove(absl::StrCat(folder_, "/", name), ignored);
  }
}

absl::Status CheckpointFolder::Save(const Checkpoint& checkpoint) {
  ASSIGN_OR_RETURN(const std::string file, SerializeCheckpoint(checkpoint));
  RemoveTemporaryFiles();
  const std::string name = Name(checkpoint.updates);
  RETURN_IF_ERROR(WriteFileAtomically(absl::StrCat(folder_, "/", name), file));
  ASSIGN_OR_RETURN(const std::vector<std::string> names, List(folder_));
  for (size_t i = 0; i + keep_ < names.size(); ++i) {
    if (names[i] == name) continue;  // behind ones that could not be read
    std::error_code error;
    std::filesystem::remove(absl::StrCat(folder_, "/", names[i]), error);
    if (error) LogWarning("cannot remove old checkpoint {}/{}: {}", folder_, names[i], error.message());
  }
  return absl::OkStatus();
}

absl::StatusOr<Checkpoint> CheckpointFolder::LoadNewest(int64_t before) {
  ASSIGN_OR_RETURN(std::vector<std::string> names, List(folder_));
  ASSIGN_OR_RETURN(const std::vector<std::string> damaged, List(folder_, kDamaged));
  const std::string limit = Name(before);
  std::erase_if(names, [&](const std::string& name) { return name >= limit; });
  for (auto name = names.rbegin(); name != names.rend(); ++name) {
    const std::string path = absl::StrCat(folder_, "/", *name);
    ASSIGN_OR_RETURN(const std::string file, ReadFile(path));
    absl::StatusOr<Checkpoint> checkpoint = ParseCheckpoint(file);
    if (checkpoint.ok()) return checkpoint;
    LogError("checkpoint refused, the one before it is tried path={} reason={}", path, checkpoint.status().ToString());
    if (absl::IsDataLoss(checkpoint.status())) {
      std::error_code error;
      std::filesystem::rename(path, absl::StrCat(path, ".damaged"), error);
      if (error) LogWarning("cannot set {} aside: {}", path, error.message());
    }
  }
  if (names.empty() && damaged.empty()) return absl::NotFoundError(absl::StrCat("no checkpoint in ", folder_));
  return absl::FailedPreconditionError(
      absl::StrCat("none of the ", names.size() + damaged.size(), " checkpoints in ", folder_,
                   " can be used: bring one back from a backup, or move them away to begin anew"));
}

absl::StatusOr<bool> CheckpointFolder::empty() const {
  ASSIGN_OR_RETURN(const std::vector<std::string> names, List(folder_));
  return names.empty();
}

}  // namespace orrery
