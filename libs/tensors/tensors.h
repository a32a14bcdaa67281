// Conversions between host arrays, wire tensors and torch tensors: the only library that knows all three.
#pragma once

#include <torch/torch.h>

#include "absl/status/statusor.h"
#include "libs/base/array.h"
#include "orrery/common/v1/tensor.pb.h"

namespace orrery {

// INVALID_ARGUMENT for a shape that torch cannot hold: more than 16 dimensions, a negative size, or strides too large.
absl::Status CheckTorchShape(absl::Span<const int64_t> shape);

torch::ScalarType ToTorch(DType dtype);
// INVALID_ARGUMENT for a type that has no counterpart (bfloat16, bool, …).
absl::StatusOr<DType> FromTorch(torch::ScalarType type);

// Copies; the array must be consistent (CheckArray).
torch::Tensor ToTorch(const Array& array);
// Copies a CPU or device tensor.
absl::StatusOr<Array> ToArray(const torch::Tensor& tensor);

// INVALID_ARGUMENT naming `what` for a wrong type, shape or length; what passes is safe for ToTorch.
absl::StatusOr<Array> ToArray(const common::v1::Tensor& tensor, absl::string_view what);
common::v1::Tensor ToProto(const Array& array);

}  // namespace orrery
