#include "libs/tensors/safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "libs/base/array.h"
#include "libs/base/file.h"
#include "libs/base/status.h"
#include "libs/tensors/tensors.h"

namespace orrery {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kLengthBytes = 8;
constexpr char kMetadata[] = "__metadata__";

struct TypeName {
  const char* name;
  torch::ScalarType type;
};
constexpr TypeName kTypes[] = {
    {"U8", torch::kUInt8},    {"I32", torch::kInt32},    {"I64", torch::kInt64},     {"F32", torch::kFloat32},
    {"F64", torch::kFloat64}, {"BF16", torch::kBFloat16}, {"F16", torch::kFloat16},
};

struct Entry {
  std::string name;
  torch::ScalarType type = torch::kUInt8;
  std::vector<int64_t> shape;
  uint64_t begin = 0;
  uint64_t end = 0;
};

uint64_t LoadLittleEndian(absl::string_view bytes) {
  uint64_t value = 0;
  for (size_t i = kLengthBytes; i-- > 0;) value = value << 8 | static_cast<uint8_t>(bytes[i]);
  return value;
}

std::string StoreLittleEndian(uint64_t value) {
  std::string bytes;
  for (size_t i = 0; i < kLengthBytes; ++i) bytes.push_back(static_cast<char>(value >> (8 * i) & 0xFF));
  return bytes;
}

absl::Status Damaged(absl::string_view what, absl::string_view problem) {
  return absl::DataLossError(absl::StrCat("safetensors: ", what, ": ", problem));
}

absl::StatusOr<torch::ScalarType> ParseType(const std::string& name) {
  if (name == "BOOL") return torch::kUInt8;
  for (const TypeName& t : kTypes) {
    if (name == t.name) return t.type;
  }
  return absl::DataLossError(
      absl::StrCat("type \"", name, "\" is unknown, expected U8, I32, I64, F32, F64, BOOL, BF16 or F16"));
}

absl::StatusOr<std::string> NameOfType(torch::ScalarType type) {
  if (type == torch::kBool) return "BOOL";
  for (const TypeName& t : kTypes) {
    if (type == t.type) return t.name;
  }
  return absl::InvalidArgumentError(absl::StrCat("type ", c10::toString(type), " cannot be saved"));
}

// The header of real files is three levels deep; deeper nesting only serves to exhaust memory.
absl::StatusOr<Json> ParseJson(absl::string_view text) {
  auto limit_depth = [](int depth, Json::parse_event_t event, Json&) {
    const bool opens = event == Json::parse_event_t::array_start || event == Json::parse_event_t::object_start;
    if (opens && depth > 2) throw std::length_error("nested too deeply");
    return true;
  };
  try {
    Json json = Json::parse(text.begin(), text.end(), limit_depth);
    if (!json.is_object()) return Damaged("header", "not a JSON object");
    return json;
  } catch (const std::exception& e) {
    return Damaged("header", e.what());
  }
}

absl::StatusOr<std::vector<int64_t>> ParseSizes(const Json& json) {
  if (!json.is_array()) return absl::DataLossError("not a list");
  std::vector<int64_t> sizes;
  for (const Json& size : json) {
    if (!size.is_number_unsigned() || size.get<uint64_t>() > std::numeric_limits<int64_t>::max()) {
      return absl::DataLossError("not a list of non-negative integers of 63 bits");
    }
    sizes.push_back(size.get<int64_t>());
  }
  return sizes;
}

absl::StatusOr<Entry> ParseEntry(const std::string& name, const Json& json) {
  if (!json.is_object() || json.size() != 3 || !json.contains("dtype") || !json.contains("shape") ||
      !json.contains("data_offsets") || !json["dtype"].is_string()) {
    return Damaged(name, "expected dtype, shape and data_offsets");
  }
  Entry entry{name};
  auto type = ParseType(json["dtype"].get_ref<const std::string&>());
  if (!type.ok()) return Damaged(name, type.status().message());
  entry.type = *type;
  auto shape = ParseSizes(json["shape"]);
  if (!shape.ok()) return Damaged(name, absl::StrCat("shape: ", shape.status().message()));
  if (absl::Status s = CheckTorchShape(*shape); !s.ok()) return Damaged(name, s.message());
  entry.shape = *std::move(shape);
  auto offsets = ParseSizes(json["data_offsets"]);
  if (!offsets.ok()) return Damaged(name, absl::StrCat("data_offsets: ", offsets.status().message()));
  if (offsets->size() != 2 || (*offsets)[0] > (*offsets)[1]) return Damaged(name, "data_offsets: expected [begin, end]");
  entry.begin = (*offsets)[0];
  entry.end = (*offsets)[1];
  ASSIGN_OR_RETURN(const int64_t count, ElementCount(entry.shape));
  const uint64_t expected = static_cast<uint64_t>(count) * c10::elementSize(entry.type);
  if (entry.end - entry.begin != expected) {
    return Damaged(name, absl::StrCat("data_offsets hold ", entry.end - entry.begin, " bytes, but shape ",
                                      ShapeString(entry.shape), " takes ", expected));
  }
  return entry;
}

absl::Status ParseMetadata(const Json& json, std::map<std::string, std::string>& metadata) {
  if (!json.is_object()) return Damaged(kMetadata, "not an object of strings");
  for (const auto& [key, value] : json.items()) {
    if (!value.is_string()) return Damaged(absl::StrCat(kMetadata, ".", key), "not a string");
    metadata[key] = value.get<std::string>();
  }
  return absl::OkStatus();
}

// Sorted by position; together they cover the `size` data bytes exactly once.
absl::Status CheckCoverage(std::vector<Entry>& entries, uint64_t size) {
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return std::tie(a.begin, a.end) < std::tie(b.begin, b.end); });
  uint64_t position = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != position) {
      return Damaged(entry.name, absl::StrCat("begins at byte ", entry.begin, ", expected ", position));
    }
    position = entry.end;
    if (position > size) {
      return Damaged(entry.name, absl::StrCat("ends at byte ", position, ", but the file holds ", size));
    }
  }
  if (position == size) return absl::OkStatus();
  return Damaged("data", absl::StrCat("the file holds ", size, " bytes, but the tensors take ", position));
}

absl::StatusOr<absl::string_view> HeaderOf(absl::string_view bytes) {
  if (bytes.size() < kLengthBytes) {
    return Damaged("header length", absl::StrCat("the file has ", bytes.size(), " bytes, expected at least 8"));
  }
  const uint64_t length = LoadLittleEndian(bytes);
  const uint64_t most = std::min<uint64_t>(kMaxHeaderBytes, bytes.size() - kLengthBytes);
  if (length < 2 || length > most) {
    return Damaged("header length", absl::StrCat(length, " is out of range, expected 2 to ", most));
  }
  const absl::string_view header = bytes.substr(kLengthBytes, length);
  if (header[0] != '{') return Damaged("header", "does not begin with '{'");
  return header;
}

// Widest elements first, then by name: every tensor is aligned to its element, as Python's reader wants it.
std::vector<std::pair<std::string, torch::Tensor>> Ordered(const std::map<std::string, torch::Tensor>& tensors) {
  std::vector<std::pair<std::string, torch::Tensor>> ordered;
  for (const auto& [name, tensor] : tensors) {
    ordered.emplace_back(name, tensor.detach().to(torch::kCPU).contiguous());
  }
  std::stable_sort(ordered.begin(), ordered.end(),
                   [](const auto& a, const auto& b) { return a.second.element_size() > b.second.element_size(); });
  return ordered;
}

absl::StatusOr<std::string> Serialize(const SafeTensors& contents) {
  Json header = Json::object();
  if (!contents.metadata.empty()) header[kMetadata] = contents.metadata;
  const auto ordered = Ordered(contents.tensors);
  uint64_t size = 0;
  for (const auto& [name, tensor] : ordered) {
    auto type = NameOfType(tensor.scalar_type());
    if (!type.ok()) return Annotate(type.status(), name);
    header[name] = {{"dtype", *type},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", std::vector<uint64_t>{size, size + tensor.nbytes()}}};
    size += tensor.nbytes();
  }
  std::string text = header.dump();
  text.append((kLengthBytes - text.size() % kLengthBytes) % kLengthBytes, ' ');
  if (text.size() > kMaxHeaderBytes) return absl::InvalidArgumentError("the header is larger than 100 MB");
  std::string bytes = StoreLittleEndian(text.size());
  bytes.reserve(kLengthBytes + text.size() + size);
  bytes += text;
  for (const auto& [name, tensor] : ordered) {
    if (tensor.nbytes() > 0) bytes.append(static_cast<const char*>(tensor.data_ptr()), tensor.nbytes());
  }
  return bytes;
}

}  // namespace

absl::StatusOr<SafeTensors> ParseSafeTensors(absl::string_view bytes) {
  ASSIGN_OR_RETURN(const absl::string_view header, HeaderOf(bytes));
  ASSIGN_OR_RETURN(const Json json, ParseJson(header));
  const absl::string_view data = bytes.substr(kLengthBytes + header.size());
  SafeTensors contents;
  std::vector<Entry> entries;
  for (const auto& [name, value] : json.items()) {
    if (name == kMetadata) {
      RETURN_IF_ERROR(ParseMetadata(value, contents.metadata));
      continue;
    }
    ASSIGN_OR_RETURN(Entry entry, ParseEntry(name, value));
    entries.push_back(std::move(entry));
  }
  RETURN_IF_ERROR(CheckCoverage(entries, data.size()));
  RETURN_IF_ERROR(CatchExceptions("safetensors: allocating tensors", [&] {
    for (const Entry& entry : entries) {
      torch::Tensor tensor = torch::empty(entry.shape, torch::TensorOptions().dtype(entry.type).device(torch::kCPU));
      const absl::string_view part = data.substr(entry.begin, entry.end - entry.begin);
      if (!part.empty()) std::memcpy(tensor.data_ptr(), part.data(), part.size());
      contents.tensors.emplace(entry.name, std::move(tensor));
    }
    return absl::OkStatus();
  }));
  return contents;
}

absl::StatusOr<std::string> SerializeSafeTensors(const SafeTensors& contents) {
  for (const auto& [name, tensor] : contents.tensors) {
    if (name == kMetadata) return absl::InvalidArgumentError("\"__metadata__\" is not a name for a tensor");
    if (!tensor.defined()) return absl::InvalidArgumentError(absl::StrCat(name, ": the tensor is undefined"));
  }
  try {
    return Serialize(contents);
  } catch (const Json::exception& e) {  // a name or value that is not UTF-8
    return absl::InvalidArgumentError(absl::StrCat("safetensors: ", e.what()));
  } catch (const std::exception& e) {
    return absl::InternalError(absl::StrCat("safetensors: ", e.what()));
  }
}

absl::StatusOr<SafeTensors> LoadSafeTensors(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string bytes, ReadFile(path));
  auto contents = ParseSafeTensors(bytes);
  if (!contents.ok()) return Annotate(contents.status(), path);
  return contents;
}

absl::Status SaveSafeTensors(const std::string& path, const SafeTensors& contents) {
  auto bytes = SerializeSafeTensors(contents);
  if (!bytes.ok()) return Annotate(bytes.status(), path);
  return WriteFileAtomically(path, *bytes);
}

}  // namespace orrery
