#include "libs/replay/chunk_codec.h"

#include <zstd.h>

#include <algorithm>
#include <cassert>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "libs/base/file.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

// Layout (little-endian), described in docs/replay_storage.md:
//   "ORCK"  u16 version  u16 fields  u32 rows
//   per field: u8 name length, name, u8 dtype, u8 encoding, u8 rank of a row, u32 sizes of a row, u64 length, bytes
//   u32 CRC-32 of everything before it
constexpr absl::string_view kMagic = "ORCK";
constexpr uint16_t kVersion = 1;
constexpr size_t kHeaderBytes = 12;
constexpr size_t kChecksumBytes = 4;
constexpr size_t kMaxRank = 8;
constexpr int64_t kCompressFromRowBytes = 256;
// chunk_codec_benchmark on one core: 340 MB/s in, 640 MB/s out. Negative levels are hardly faster and pack worse.
constexpr int kLevel = 1;

enum Encoding : uint8_t { kRaw = 0, kDeltaZstd = 1 };

template <typename T>
void Put(std::string& out, T value) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the payload is written in the machine's byte order");
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out.append(bytes, sizeof(T));
}

// Reads from the front of `in`; false at the end.
template <typename T>
bool Take(absl::string_view& in, T& value) {
  if (in.size() < sizeof(T)) return false;
  std::memcpy(&value, in.data(), sizeof(T));
  in.remove_prefix(sizeof(T));
  return true;
}

bool Take(absl::string_view& in, uint64_t n, absl::string_view& bytes) {
  if (in.size() < n) return false;
  bytes = in.substr(0, n);
  in.remove_prefix(n);
  return true;
}

absl::Status Damaged(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("damaged chunk payload: ", what));
}

bool KnownDType(uint8_t value) {
  return value >= static_cast<uint8_t>(DType::kUInt8) && value <= static_cast<uint8_t>(DType::kFloat64);
}

// Contexts are kept per thread: making one costs more than packing a small chunk.
ZSTD_CCtx* CompressContext() {
  thread_local const std::unique_ptr<ZSTD_CCtx, size_t (*)(ZSTD_CCtx*)> context(ZSTD_createCCtx(), ZSTD_freeCCtx);
  return context.get();
}
ZSTD_DCtx* DecompressContext() {
  thread_local const std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx*)> context(ZSTD_createDCtx(), ZSTD_freeDCtx);
  return context.get();
}

// Differences in time of `bytes`, compressed; empty when that does not make it smaller.
std::string Compress(const std::string& bytes, size_t row_bytes) {
  std::string delta(bytes.size(), '\0');
  std::memcpy(delta.data(), bytes.data(), row_bytes);
  const auto* x = reinterpret_cast<const uint8_t*>(bytes.data());
  auto* d = reinterpret_cast<uint8_t*>(delta.data());
  for (size_t i = row_bytes; i < bytes.size(); ++i) d[i] = static_cast<uint8_t>(x[i] - x[i - row_bytes]);
  std::string packed(ZSTD_compressBound(delta.size()), '\0');
  const size_t n =
      ZSTD_compressCCtx(CompressContext(), packed.data(), packed.size(), delta.data(), delta.size(), kLevel);
  if (ZSTD_isError(n) || n >= bytes.size()) return {};
  packed.resize(n);
  return packed;
}

// Uninitialised bytes for decoding. A thread keeps some for all its calls, as much as fits a processor's cache, for fresh
// pages cost more than the decoding.
class Scratch {
 public:
  explicit Scratch(size_t size) {
    thread_local const std::unique_ptr<uint8_t[]> kept(new uint8_t[kKeptBytes]);
    if (size > kKeptBytes) own_.reset(new uint8_t[size]);
    bytes_ = own_ != nullptr ? own_.get() : kept.get();
  }
  uint8_t* bytes() { return bytes_; }

 private:
  static constexpr size_t kKeptBytes = size_t{2} << 20;
  std::unique_ptr<uint8_t[]> own_;
  uint8_t* bytes_ = nullptr;
};

// `size` was checked against the limit; exactly that many bytes come out.
absl::Status Decompress(absl::string_view packed, size_t size, uint8_t* to) {
  const size_t n = ZSTD_decompressDCtx(DecompressContext(), to, size, packed.data(), packed.size());
  if (ZSTD_isError(n) || n != size) return Damaged("compressed field");
  return absl::OkStatus();
}

// Rows begin … begin + count - 1 from the differences of all rows before and of these. `to` is no part of `delta`.
void AddUp(const uint8_t* delta, size_t row_bytes, int64_t begin, int64_t count, uint8_t* to) {
  if (count == 0) return;
  std::memcpy(to, delta, row_bytes);
  for (int64_t row = 1; row <= begin; ++row) {
    delta += row_bytes;
    for (size_t i = 0; i < row_bytes; ++i) to[i] = static_cast<uint8_t>(to[i] + delta[i]);
  }
  for (int64_t row = 1; row < count; ++row) {
    delta += row_bytes;
    const uint8_t* const before = to;
    to += row_bytes;
    for (size_t i = 0; i < row_bytes; ++i) to[i] = static_cast<uint8_t>(before[i] + delta[i]);
  }
}

absl::Status CheckField(const std::string& name, const Array& array, int64_t rows) {
  const auto refuse = [&](absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("field '", name, "' ", ShapeString(array.shape), ": ", what));
  };
  if (name.empty() || name.size() > 255) return refuse("its name must have 1 to 255 bytes");
  RETURN_IF_ERROR(CheckArray(array, absl::StrCat("field '", name, "'")));
  if (array.shape.empty() || array.shape[0] != rows) return refuse(absl::StrCat("expected ", rows, " rows"));
  if (array.shape.size() - 1 > kMaxRank) return refuse(absl::StrCat("a row has more than ", kMaxRank, " dimensions"));
  for (const int64_t size : array.shape) {
    if (size > std::numeric_limits<uint32_t>::max()) return refuse("a size above 2^32 - 1");
  }
  return absl::OkStatus();
}

void EncodeField(const std::string& name, const Array& array, std::string& out) {
  const size_t row_bytes = array.bytes.size() / array.shape[0];
  std::string packed;
  if (array.dtype == DType::kUInt8 && row_bytes >= kCompressFromRowBytes) packed = Compress(array.bytes, row_bytes);
  const std::string& bytes = packed.empty() ? array.bytes : packed;
  Put<uint8_t>(out, name.size());
  out += name;
  Put<uint8_t>(out, static_cast<uint8_t>(array.dtype));
  Put<uint8_t>(out, packed.empty() ? kRaw : kDeltaZstd);
  Put<uint8_t>(out, array.shape.size() - 1);
  for (size_t i = 1; i < array.shape.size(); ++i) Put<uint32_t>(out, array.shape[i]);
  Put<uint64_t>(out, bytes.size());
  out += bytes;
}

// Takes one field from `in`, a part of `payload`; `budget` is what may still be claimed.
absl::StatusOr<EncodedRows::Field> TakeField(absl::string_view payload, absl::string_view& in, int64_t rows, int64_t& budget) {
  uint8_t name_size = 0, dtype = 0, encoding = 0, rank = 0;
  absl::string_view name, data;
  if (!Take(in, name_size) || !Take(in, name_size, name) || !Take(in, dtype) || !Take(in, encoding) ||
      !Take(in, rank)) {
    return Damaged("cut short");
  }
  if (!KnownDType(dtype)) return Damaged(absl::StrCat("unknown dtype ", dtype));
  if (rank > kMaxRank) return Damaged(absl::StrCat("rank ", rank));
  EncodedRows::Field field{.name = std::string(name), .dtype = static_cast<DType>(dtype)};
  std::vector<int64_t> shape = {rows};
  for (int i = 0; i < rank; ++i) {
    uint32_t size = 0;
    if (!Take(in, size)) return Damaged("cut short");
    shape.push_back(size);
  }
  uint64_t length = 0;
  if (!Take(in, length) || !Take(in, length, data)) return Damaged("cut short");
  const absl::StatusOr<int64_t> count = ElementCount(shape);
  if (!count.ok()) return Damaged(count.status().message());
  const int64_t size = *count * static_cast<int64_t>(SizeOf(field.dtype));
  if (size > budget) return Damaged(absl::StrCat("claims ", size, " bytes where at most ", budget, " are expected"));
  budget -= size;
  if (encoding == kRaw) {
    if (length != static_cast<uint64_t>(size)) return Damaged("size of a raw field");
  } else if (encoding == kDeltaZstd && field.dtype == DType::kUInt8 && size > 0) {
    if (ZSTD_getFrameContentSize(data.data(), data.size()) != static_cast<uint64_t>(size)) {
      return Damaged("size of a compressed field");
    }
    field.compressed = true;
  } else {
    return Damaged(absl::StrCat("encoding ", encoding));
  }
  field.row_shape.assign(shape.begin() + 1, shape.end());
  field.row_bytes = size / rows;
  field.offset = static_cast<size_t>(data.data() - payload.data());
  field.length = data.size();
  return field;
}

// The fields by name, after every check that needs no decompression.
absl::StatusOr<std::vector<EncodedRows::Field>> TakeFields(absl::string_view payload, int64_t rows, int64_t max_bytes) {
  if (payload.size() < kHeaderBytes + kChecksumBytes) return Damaged("cut short");
  absl::string_view in = payload.substr(0, payload.size() - kChecksumBytes);
  absl::string_view tail = payload.substr(in.size());
  uint32_t checksum = 0;
  Take(tail, checksum);
  if (Checksum(in) != checksum) return Damaged("checksum");
  absl::string_view magic;
  uint16_t version = 0, count = 0;
  uint32_t claimed_rows = 0;
  if (!Take(in, kMagic.size(), magic) || magic != kMagic) return Damaged("not a chunk");
  if (!Take(in, version) || version != kVersion) return Damaged(absl::StrCat("version ", version, ", expected ", kVersion));
  if (!Take(in, count) || !Take(in, claimed_rows)) return Damaged("cut short");
  if (claimed_rows != rows || rows < 1) return Damaged(absl::StrCat(claimed_rows, " rows, expected ", rows));
  std::vector<EncodedRows::Field> fields;
  for (int i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(EncodedRows::Field field, TakeField(payload, in, rows, max_bytes));
    fields.push_back(std::move(field));
  }
  if (!in.empty()) return Damaged("bytes left over");
  std::sort(fields.begin(), fields.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  const auto same = [](const auto& a, const auto& b) { return a.name == b.name; };
  if (std::adjacent_find(fields.begin(), fields.end(), same) != fields.end()) return Damaged("a field occurs twice");
  return fields;
}

// Of a chunk of `rows` rows.
absl::Status ReadField(absl::string_view payload, const EncodedRows::Field& field, int64_t rows, int64_t begin, int64_t count,
                       char* to) {
  const absl::string_view data = payload.substr(field.offset, field.length);
  const auto row_bytes = static_cast<size_t>(field.row_bytes);
  if (!field.compressed) {
    if (row_bytes > 0) std::memcpy(to, data.data() + begin * row_bytes, count * row_bytes);
    return absl::OkStatus();
  }
  const size_t size = rows * row_bytes;
  Scratch scratch(size);
  RETURN_IF_ERROR(Decompress(data, size, scratch.bytes()));
  AddUp(scratch.bytes(), row_bytes, begin, count, reinterpret_cast<uint8_t*>(to));
  return absl::OkStatus();
}

// An array's dtype and shape without its bytes.
Array Outline(const EncodedRows::Field& field, int64_t rows) {
  Array array{field.dtype, {rows}, {}};
  array.shape.insert(array.shape.end(), field.row_shape.begin(), field.row_shape.end());
  return array;
}

}  // namespace

absl::StatusOr<std::string> EncodeRows(const ArrayMap& fields) {
  if (fields.empty() || fields.size() > std::numeric_limits<uint16_t>::max()) {
    return absl::InvalidArgumentError(absl::StrCat("expected 1 to 65535 fields, got ", fields.size()));
  }
  const auto& [first_name, first] = *fields.begin();
  const int64_t rows = first.shape.empty() ? 0 : first.shape[0];
  if (rows < 1) return absl::InvalidArgumentError(absl::StrCat("field '", first_name, "': expected at least 1 row"));
  for (const auto& [name, array] : fields) RETURN_IF_ERROR(CheckField(name, array, rows));
  std::string out(kMagic);
  Put<uint16_t>(out, kVersion);
  Put<uint16_t>(out, fields.size());
  Put<uint32_t>(out, rows);
  for (const auto& [name, array] : fields) EncodeField(name, array, out);
  Put<uint32_t>(out, Checksum(out));
  return out;
}

absl::StatusOr<ArrayMap> DecodeRows(absl::string_view payload, int64_t rows, int64_t max_bytes) {
  ASSIGN_OR_RETURN(const std::vector<EncodedRows::Field> fields, TakeFields(payload, rows, max_bytes));
  ArrayMap decoded;
  for (const EncodedRows::Field& field : fields) {
    Array array = Outline(field, rows);
    array.bytes.resize(rows * field.row_bytes);
    RETURN_IF_ERROR(ReadField(payload, field, rows, 0, rows, array.bytes.data()));
    decoded.emplace_hint(decoded.end(), field.name, std::move(array));
  }
  return decoded;
}

EncodedRows::EncodedRows(std::string payload, int64_t rows, std::vector<Field> fields)
    : payload_(std::move(payload)), rows_(rows), fields_(std::move(fields)) {}

absl::StatusOr<EncodedRows> EncodedRows::Open(std::string payload, int64_t rows, int64_t max_bytes) {
  ASSIGN_OR_RETURN(std::vector<Field> fields, TakeFields(payload, rows, max_bytes));
  return EncodedRows(std::move(payload), rows, std::move(fields));
}

absl::Status EncodedRows::Read(size_t field, int64_t begin, int64_t count, char* to) const {
  assert(field < fields_.size() && begin >= 0 && count >= 0 && begin <= rows_ - count);
  return ReadField(payload_, fields_[field], rows_, begin, count, to);
}

absl::Status CheckRows(const ArrayMap& rows) {
  struct Field {
    const char* name;
    DType dtype;
    size_t dimensions;
  };
  constexpr Field kFields[] = {{kAction, DType::kFloat32, 2},
                               {kReward, DType::kFloat32, 1},
                               {kIsFirst, DType::kUInt8, 1},
                               {kIsTerminal, DType::kUInt8, 1}};
  for (const Field& expected : kFields) {
    const auto found = rows.find(expected.name);
    if (found == rows.end()) return absl::InvalidArgumentError(absl::StrCat("field \"", expected.name, "\" is missing"));
    const Array& array = found->second;
    if (array.dtype == expected.dtype && array.shape.size() == expected.dimensions) continue;
    return absl::InvalidArgumentError(absl::StrCat("field \"", expected.name, "\" is ", Name(array.dtype), " ",
                                                   ShapeString(array.shape), ": expected ", Name(expected.dtype), " with ",
                                                   expected.dimensions, " dimension(s)"));
  }
  if (rows.size() == std::size(kFields)) return absl::InvalidArgumentError("there is no observation beside the other fields");
  return absl::OkStatus();
}

absl::Status CheckPayload(absl::string_view payload, int64_t rows, int64_t max_bytes) {
  ASSIGN_OR_RETURN(const std::vector<EncodedRows::Field> fields, TakeFields(payload, rows, max_bytes));
  ArrayMap outlines;
  for (const EncodedRows::Field& field : fields) outlines.emplace(field.name, Outline(field, rows));
  RETURN_IF_ERROR(CheckRows(outlines));
  for (const EncodedRows::Field& field : fields) {
    if (!field.compressed) continue;
    const auto size = static_cast<size_t>(rows * field.row_bytes);
    Scratch scratch(size);
    RETURN_IF_ERROR(Decompress(payload.substr(field.offset, field.length), size, scratch.bytes()));
  }
  return absl::OkStatus();
}

}  // namespace orrery
