#include "libs/tensors/tensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

TEST(Tensors, EveryTypeSurvivesArrayTorchAndWire) {
  for (DType dtype : {DType::kUInt8, DType::kInt32, DType::kInt64, DType::kFloat32, DType::kFloat64}) {
    Array array = Array::Zeros(dtype, {2, 3});
    for (size_t i = 0; i < array.bytes.size(); ++i) array.bytes[i] = static_cast<char>(i);
    EXPECT_THAT(FromTorch(ToTorch(dtype)), IsOkAndHolds(dtype));
    const torch::Tensor tensor = ToTorch(array);
    EXPECT_EQ(tensor.sizes().vec(), array.shape);
    EXPECT_THAT(ToArray(tensor), IsOkAndHolds(array));
    EXPECT_THAT(ToArray(ToProto(array), "x"), IsOkAndHolds(array));
  }
}

TEST(Tensors, ToArrayCopiesNonContiguousTensorsInRowMajorOrder) {
  const torch::Tensor tensor = torch::arange(6, torch::kFloat32).view({2, 3}).t().requires_grad_();
  EXPECT_THAT(ToArray(tensor), IsOkAndHolds(Array::From<float>({0, 3, 1, 4, 2, 5}, {3, 2})));
}

TEST(Tensors, ScalarsAndEmptyArraysPass) {
  const Array scalar = Array::From<int64_t>({7}, {});
  EXPECT_EQ(ToTorch(scalar).item<int64_t>(), 7);
  const Array empty = Array::Zeros(DType::kUInt8, {0, 4});
  EXPECT_THAT(ToArray(ToTorch(empty)), IsOkAndHolds(empty));
}

TEST(Tensors, TypesWithoutCounterpartAreRefused) {
  EXPECT_THAT(ToArray(torch::zeros({2}, torch::kBFloat16)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("BFloat16")));
  EXPECT_THAT(ToArray(torch::Tensor()), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("undefined")));
}

common::v1::Tensor Wire(int type, std::vector<int64_t> shape, size_t bytes) {
  common::v1::Tensor tensor;
  tensor.set_data_type(static_cast<common::v1::DataType>(type));
  tensor.mutable_shape()->Add(shape.begin(), shape.end());
  tensor.set_data(std::string(bytes, '\0'));
  return tensor;
}

TEST(Tensors, WrongWireTensorsAreRefusedByName) {
  const int64_t huge = int64_t{1} << 62;
  for (const auto& wrong : {Wire(0, {1}, 1), Wire(6, {1}, 1), Wire(-1, {1}, 1), Wire(4, {2}, 7), Wire(4, {-1}, 0),
                            Wire(1, {huge, huge}, 0), Wire(1, {0, huge, huge}, 0),
                            Wire(1, std::vector<int64_t>(17, 1), 1)}) {
    EXPECT_THAT(ToArray(wrong, "slot 3: image"),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("slot 3: image")))
        << wrong.ShortDebugString();
  }
}

}  // namespace
}  // namespace orrery
