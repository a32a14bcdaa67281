// Conversions between host arrays, wire tensors and torch tensors: the only library that knows all three.
#pragma once

#include <torch/torch.h>

#include "absl/status/statusor.h"
#include "libs/base/array.h"
#include "orrery/common/v1/tensor.pb.h"

namespace orrery {

torch::ScalarType ToTorch(DType dtype);
// INVALID_ARGUMENT for a type that has no counterpart (bfloat16, bool, …).
absl::StatusOr<DType> FromTorch(torch::ScalarType type);

// Copies; the array must be consistent (CheckArray).
torch::Tensor ToTorch(const Array& array);
// Copies a CPU or device tensor.
absl::StatusOr<Array> ToArray(const torch::Tensor& tensor);

// Checks type, shape and length; errors name `what`.
absl::StatusOr<Array> ToArray(const common::v1::Tensor& tensor, absl::string_view what);
common::v1::Tensor ToProto(const Array& array);

}  // namespace orrery
