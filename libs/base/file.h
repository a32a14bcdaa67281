// Whole files, written so that a crash leaves the old one or the new one.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace orrery {

// The whole file. NOT_FOUND, or another code with the system's words, naming the path.
absl::StatusOr<std::string> ReadFile(const std::string& path);
// Writes a temporary file beside `path`, syncs it, renames it over `path` and syncs the folder.
// RESOURCE_EXHAUSTED when the disk is full; then `path` is as it was.
absl::Status WriteFileAtomically(const std::string& path, absl::string_view contents);
// Makes the folder and its parents.
absl::Status MakeDirectory(const std::string& path);
// CRC-32 (zlib's polynomial) of `data`.
uint32_t Checksum(absl::string_view data);

}  // namespace orrery
