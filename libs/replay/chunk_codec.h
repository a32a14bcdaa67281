// Encoding of a chunk's rows (docs/replay_storage.md): per field name, dtype, shape and bytes. uint8 fields of 256 bytes a
// row or more are differenced in time (modulo 256) and compressed with zstd; others are raw. A checksum covers everything.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "libs/base/array.h"

namespace orrery {

// Names of the fields beside the modalities: action [rows, A] float32 (a_{t-1} that led to row t; zeros in row 0), reward
// [rows] float32, is_first [rows] uint8, is_terminal [rows] uint8.
inline constexpr char kAction[] = "action";
inline constexpr char kReward[] = "reward";
inline constexpr char kIsFirst[] = "is_first";
inline constexpr char kIsTerminal[] = "is_terminal";

// `fields`: every array's first dimension is the number of rows, at least 1. Bit-exact. INVALID_ARGUMENT names the field.
absl::StatusOr<std::string> EncodeRows(const ArrayMap& fields);
// DATA_LOSS for a damaged payload, or one of another number of rows than `rows`, or whose decoded size would be above
// `max_bytes`: nothing is allocated beyond what was checked.
absl::StatusOr<ArrayMap> DecodeRows(absl::string_view payload, int64_t rows, int64_t max_bytes = int64_t{1} << 30);

// Whether decoded rows are what a learner can use: action, reward, is_first and is_terminal with the types above and at least
// one modality. INVALID_ARGUMENT names the field.
absl::Status CheckRows(const ArrayMap& rows);

}  // namespace orrery
