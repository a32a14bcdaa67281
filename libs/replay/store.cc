#include "libs/replay/store.h"

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "libs/base/status.h"
#include "libs/replay/chunk_text.h"
#include "libs/replay/file_store.h"
#include "libs/replay/memory_store.h"
#include "libs/replay/redis_location.h"
#include "libs/replay/redis_store.h"
#include "libs/replay/store_password.h"

namespace orrery {
namespace {

bool IsMemory(const std::string& location) { return location == "memory:"; }

bool IsRedis(const std::string& location) { return SplitRedisLocation(location).has_value(); }

bool IsFile(const std::string& location, std::string& folder) {
  absl::string_view rest = location;
  if (!absl::ConsumePrefix(&rest, "file:") || rest.empty()) return false;
  folder = std::string(rest);
  return true;
}

absl::Status NotALocation(const std::string& location) {
  // What is before '@' may be a password.
  const size_t at = location.rfind('@');
  const std::string shown = at == std::string::npos ? location : absl::StrCat("…", location.substr(at));
  if (absl::StartsWith(location, "rediss://")) {
    return absl::InvalidArgumentError(absl::StrCat("location of the store is '", shown,
                                                   "': TLS goes through a stunnel beside this program "
                                                   "(docs/replay_storage.md), expected redis:// and stunnel's HOST:PORT"));
  }
  return absl::InvalidArgumentError(absl::StrCat("location of the store is '", shown,
                                                 "', expected memory:, file:FOLDER, redis://[user:password@]HOST:PORT or "
                                                 "redis-cluster://[user:password@]HOST:PORT[,HOST:PORT…]"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Store>> OpenStore(const StoreOptions& given) {
  RETURN_IF_ERROR(CheckName("name of the run", given.run));
  StoreOptions options = given;
  ASSIGN_OR_RETURN(options.location, AddStorePassword(given.location));
  if (IsMemory(options.location)) return MakeMemoryStore(options);
  if (IsRedis(options.location)) return OpenRedisStore(options);
  FileStoreOptions file;
  if (!IsFile(options.location, file.folder)) return NotALocation(options.location);
  absl::StrAppend(&file.folder, "/", options.run);
  file.change_log_length = options.change_log_length;
  return OpenFileStore(file);
}

absl::StatusOr<std::vector<DataSetSummary>> ListDataSets(const std::string& given, absl::Duration timeout) {
  const absl::StatusOr<std::string> location = AddStorePassword(given);
  if (!location.ok()) return location.status();
  if (IsMemory(*location)) return std::vector<DataSetSummary>();
  if (IsRedis(*location)) return ListRedisDataSets(*location, timeout);
  std::string folder;
  if (!IsFile(*location, folder)) return NotALocation(*location);
  return ListFileDataSets(folder);
}

absl::Status DeleteDataSet(const StoreOptions& given) {
  RETURN_IF_ERROR(CheckName("name of the run", given.run));
  StoreOptions options = given;
  ASSIGN_OR_RETURN(options.location, AddStorePassword(given.location));
  if (IsMemory(options.location)) return absl::NotFoundError("memory: keeps no data sets");
  if (IsRedis(options.location)) return DeleteRedisDataSet(options);
  std::string folder;
  if (!IsFile(options.location, folder)) return NotALocation(options.location);
  return DeleteFileDataSet(absl::StrCat(folder, "/", options.run));
}

}  // namespace orrery
