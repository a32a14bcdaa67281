// Encoding of a chunk's rows (docs/replay_storage.md): per field name, dtype, shape and bytes. uint8 fields of 256 bytes a
// row or more are differenced in time (modulo 256) and compressed with zstd; others are raw. A checksum covers everything.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

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

// An encoded chunk whose layout, sizes and checksum were checked. Rows are decoded when they are read, each time anew: where
// pictures compress this holds a few hundredths of what they decode to. Thread-safe: it never changes.
class EncodedRows {
 public:
  struct Field {
    std::string name;
    DType dtype = DType::kFloat32;
    std::vector<int64_t> row_shape;
    int64_t row_bytes = 0;
    // Where its bytes lie in the payload.
    bool compressed = false;
    size_t offset = 0;
    size_t length = 0;
  };

  // As DecodeRows; damage inside a compressed field may show only when it is read.
  static absl::StatusOr<EncodedRows> Open(std::string payload, int64_t rows, int64_t max_bytes = int64_t{1} << 30);

  int64_t rows() const { return rows_; }
  const std::string& payload() const { return payload_; }
  // Payload and table of fields.
  int64_t memory_bytes() const { return static_cast<int64_t>(payload_.size() + fields_.capacity() * sizeof(Field)); }
  // By name, ascending; no name twice.
  const std::vector<Field>& fields() const { return fields_; }
  // Copies rows begin … begin + count - 1, which must be there, of fields()[field] to `to`: count * row_bytes bytes.
  // The whole of a compressed field is decoded meanwhile. DATA_LOSS: it is damaged.
  absl::Status Read(size_t field, int64_t begin, int64_t count, char* to) const;

 private:
  EncodedRows(std::string payload, int64_t rows, std::vector<Field> fields);

  std::string payload_;
  int64_t rows_;
  std::vector<Field> fields_;
};

// Whether decoded rows are what a learner can use: action, reward, is_first and is_terminal with the types above and at least
// one modality. INVALID_ARGUMENT names the field.
absl::Status CheckRows(const ArrayMap& rows);
// DecodeRows and CheckRows of a payload without holding its rows: no more is allocated than the largest field decodes to.
absl::Status CheckPayload(absl::string_view payload, int64_t rows, int64_t max_bytes);

}  // namespace orrery
