#include "libs/base/array.h"

#include <cassert>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "libs/base/status.h"

namespace orrery {

size_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
      return 1;
    case DType::kInt32:
    case DType::kFloat32:
      return 4;
    case DType::kInt64:
    case DType::kFloat64:
      return 8;
  }
  return 1;
}

absl::string_view Name(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
      return "uint8";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
  }
  return "unknown";
}

std::string ShapeString(absl::Span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

absl::StatusOr<int64_t> ElementCount(absl::Span<const int64_t> shape) {
  int64_t count = 1;
  for (int64_t size : shape) {
    if (size < 0) {
      return absl::InvalidArgumentError(absl::StrCat("shape ", ShapeString(shape), " has a negative size"));
    }
    if (size != 0 && count > std::numeric_limits<int64_t>::max() / 8 / size) {
      return absl::InvalidArgumentError(absl::StrCat("shape ", ShapeString(shape), " is too large"));
    }
    count *= size;
  }
  return count;
}

Array Array::Zeros(DType dtype, std::vector<int64_t> shape) {
  auto count = ElementCount(shape);
  assert(count.ok());
  return Array{dtype, std::move(shape), std::string(*count * SizeOf(dtype), '\0')};
}

absl::Status CheckArray(const Array& array, absl::string_view what) {
  auto count = ElementCount(array.shape);
  if (!count.ok()) return Annotate(count.status(), what);
  if (array.bytes.size() != *count * SizeOf(array.dtype)) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": ", Name(array.dtype), ShapeString(array.shape), " takes ",
                                                   *count * SizeOf(array.dtype), " bytes, got ", array.bytes.size()));
  }
  return absl::OkStatus();
}

}  // namespace orrery
