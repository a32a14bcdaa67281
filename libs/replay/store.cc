#include "libs/replay/store.h"

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "libs/base/status.h"
#include "libs/replay/chunk_text.h"
#include "libs/replay/file_store.h"
#include "libs/replay/memory_store.h"
#include "libs/replay/redis_store.h"

namespace orrery {

absl::StatusOr<std::unique_ptr<Store>> OpenStore(const StoreOptions& options) {
  RETURN_IF_ERROR(CheckName("name of the run", options.run));
  absl::string_view folder = options.location;
  if (options.location == "memory:") return MakeMemoryStore(options);
  if (absl::StartsWith(options.location, "redis://")) return OpenRedisStore(options);
  if (absl::ConsumePrefix(&folder, "file:") && !folder.empty()) {
    FileStoreOptions file;
    file.folder = absl::StrCat(folder, "/", options.run);
    file.change_log_length = options.change_log_length;
    return OpenFileStore(file);
  }
  // What is before '@' may be a password.
  const size_t at = options.location.rfind('@');
  const std::string shown = at == std::string::npos ? options.location : absl::StrCat("…", options.location.substr(at));
  return absl::InvalidArgumentError(absl::StrCat("location of the store is '", shown,
                                                 "', expected memory:, file:FOLDER or redis://[user:password@]HOST:PORT"));
}

}  // namespace orrery
