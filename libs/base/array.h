// A dense host array without any dependency: what environments return, what replay stores.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace orrery {

enum class DType : uint8_t { kUInt8 = 1, kInt32 = 2, kInt64 = 3, kFloat32 = 4, kFloat64 = 5 };

// Bytes of one element.
size_t SizeOf(DType dtype);
// "uint8", "int32", "int64", "float32", "float64".
absl::string_view Name(DType dtype);
// "[50, 64, 64, 3]".
std::string ShapeString(absl::Span<const int64_t> shape);
// Product of the sizes; INVALID_ARGUMENT if one is negative or the product times 8 overflows int64.
absl::StatusOr<int64_t> ElementCount(absl::Span<const int64_t> shape);

template <typename T>
constexpr DType DTypeOf();
template <>
constexpr DType DTypeOf<uint8_t>() { return DType::kUInt8; }
template <>
constexpr DType DTypeOf<int32_t>() { return DType::kInt32; }
template <>
constexpr DType DTypeOf<int64_t>() { return DType::kInt64; }
template <>
constexpr DType DTypeOf<float>() { return DType::kFloat32; }
template <>
constexpr DType DTypeOf<double>() { return DType::kFloat64; }

// Row-major array; `bytes` holds exactly the elements. A plain value: copy it, move it, compare it.
struct Array {
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  std::string bytes;

  bool operator==(const Array&) const = default;

  // Elements, from the size of `bytes`.
  int64_t size() const { return static_cast<int64_t>(bytes.size() / SizeOf(dtype)); }
  // The elements as T; dtype must be T's (checked by assert).
  template <typename T>
  absl::Span<const T> as() const {
    return {reinterpret_cast<const T*>(bytes.data()), bytes.size() / sizeof(T)};
  }
  template <typename T>
  absl::Span<T> mutable_as() {
    return {reinterpret_cast<T*>(bytes.data()), bytes.size() / sizeof(T)};
  }

  // Zeros of that shape; shape must be valid.
  static Array Zeros(DType dtype, std::vector<int64_t> shape);
  // From values; shape's product must be their number.
  template <typename T>
  static Array From(absl::Span<const T> values, std::vector<int64_t> shape) {
    Array a{DTypeOf<T>(), std::move(shape), std::string(values.size() * sizeof(T), '\0')};
    if (!values.empty()) std::memcpy(a.bytes.data(), values.data(), a.bytes.size());
    return a;
  }
};

// INVALID_ARGUMENT naming `what` unless the byte length fits shape and dtype.
absl::Status CheckArray(const Array& array, absl::string_view what);

// One array per modality or field, by name.
using ArrayMap = std::map<std::string, Array>;

}  // namespace orrery
