// The password of a Redis that is not in its location, so that it is in no list of processes.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace orrery {

// Read where no file is given, for locations without a password.
inline constexpr char kStorePasswordVariable[] = "ORRERY_STORE_PASSWORD";

// `location` (store.h) with the password that `file` holds: its text without the last newline, of any characters. The
// location may name a user: "redis://USER@HOST:PORT". Without a file, the password is the environment variable's; a location
// that has one already, and one that is not a Redis', stay as they are. With a file, those are INVALID_ARGUMENT, as is an empty
// file; one that cannot be read has the error of ReadFile. Messages name the file and show no password.
absl::StatusOr<std::string> AddStorePassword(const std::string& location, const std::string& file = "");

}  // namespace orrery
