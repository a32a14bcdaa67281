#include "libs/tensors/tensors.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

constexpr int kMaxRank = 16;

static_assert(common::v1::UINT8 == static_cast<int>(DType::kUInt8));
static_assert(common::v1::INT32 == static_cast<int>(DType::kInt32));
static_assert(common::v1::INT64 == static_cast<int>(DType::kInt64));
static_assert(common::v1::FLOAT32 == static_cast<int>(DType::kFloat32));
static_assert(common::v1::FLOAT64 == static_cast<int>(DType::kFloat64));

}  // namespace

absl::Status CheckTorchShape(absl::Span<const int64_t> shape) {
  if (shape.size() > kMaxRank) {
    return absl::InvalidArgumentError(
        absl::StrCat("shape has ", shape.size(), " dimensions, expected at most ", kMaxRank));
  }
  // Strides are products over the other sizes, so they can overflow even where a size of 0 makes the count 0.
  std::vector<int64_t> sizes(shape.begin(), shape.end());
  std::replace(sizes.begin(), sizes.end(), int64_t{0}, int64_t{1});
  return ElementCount(sizes).status();
}

torch::ScalarType ToTorch(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
      return torch::kUInt8;
    case DType::kInt32:
      return torch::kInt32;
    case DType::kInt64:
      return torch::kInt64;
    case DType::kFloat32:
      return torch::kFloat32;
    case DType::kFloat64:
      return torch::kFloat64;
  }
  return torch::kUInt8;
}

absl::StatusOr<DType> FromTorch(torch::ScalarType type) {
  switch (type) {
    case torch::kUInt8:
      return DType::kUInt8;
    case torch::kInt32:
      return DType::kInt32;
    case torch::kInt64:
      return DType::kInt64;
    case torch::kFloat32:
      return DType::kFloat32;
    case torch::kFloat64:
      return DType::kFloat64;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("tensor type ", c10::toString(type), ": expected Byte, Int, Long, Float or Double"));
  }
}

torch::Tensor ToTorch(const Array& array) {
  torch::Tensor tensor = torch::empty(array.shape, torch::TensorOptions().dtype(ToTorch(array.dtype)));
  if (!array.bytes.empty()) std::memcpy(tensor.data_ptr(), array.bytes.data(), array.bytes.size());
  return tensor;
}

absl::StatusOr<Array> ToArray(const torch::Tensor& tensor) {
  if (!tensor.defined()) return absl::InvalidArgumentError("the tensor is undefined");
  ASSIGN_OR_RETURN(const DType dtype, FromTorch(tensor.scalar_type()));
  return CatchExceptions("copying a tensor to the host", [&]() -> absl::StatusOr<Array> {
    const torch::Tensor host = tensor.detach().to(torch::kCPU).contiguous();
    Array array{dtype, host.sizes().vec(), std::string(host.nbytes(), '\0')};
    if (!array.bytes.empty()) std::memcpy(array.bytes.data(), host.data_ptr(), array.bytes.size());
    return array;
  });
}

absl::StatusOr<Array> ToArray(const common::v1::Tensor& tensor, absl::string_view what) {
  if (!common::v1::DataType_IsValid(tensor.data_type()) ||
      tensor.data_type() == common::v1::DATA_TYPE_UNSPECIFIED) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": data type ", static_cast<int>(tensor.data_type()), " is unknown, expected 1 to 5"));
  }
  RETURN_IF_ERROR(Annotate(CheckTorchShape(tensor.shape()), what));
  Array array{static_cast<DType>(tensor.data_type()), {tensor.shape().begin(), tensor.shape().end()}, tensor.data()};
  RETURN_IF_ERROR(CheckArray(array, what));
  return array;
}

common::v1::Tensor ToProto(const Array& array) {
  common::v1::Tensor tensor;
  tensor.set_data_type(static_cast<common::v1::DataType>(array.dtype));
  tensor.mutable_shape()->Add(array.shape.begin(), array.shape.end());
  tensor.set_data(array.bytes);
  return tensor;
}

}  // namespace orrery
