#include "libs/tensors/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "absl/strings/str_cat.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

std::string File(const std::string& header, size_t data_bytes) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(header.size() >> (8 * i) & 0xFF));
  return bytes + header + std::string(data_bytes, '\0');
}

SafeTensors Sample() {
  SafeTensors contents;
  contents.tensors["a.odd"] = torch::tensor({1, 2, 3}, torch::kUInt8);
  contents.tensors["b"] = torch::arange(6, torch::kFloat32).view({2, 3});
  contents.tensors["c.scalar"] = torch::tensor(2.5, torch::kFloat64);
  contents.tensors["d.empty"] = torch::empty({0, 4});
  contents.metadata = {{"orrery.model", "min_std: 0.1"}, {"quotes", "\"\\\n\xC3\xA4"}};
  return contents;
}

TEST(SafeTensors, EveryTypeSurvives) {
  for (torch::ScalarType type : {torch::kUInt8, torch::kInt32, torch::kInt64, torch::kFloat32, torch::kFloat64,
                                 torch::kBFloat16, torch::kFloat16}) {
    SafeTensors contents;
    contents.tensors["x"] = torch::arange(6, torch::kInt64).view({1, 2, 3}).to(type);
    ASSERT_OK_AND_ASSIGN(const std::string bytes, SerializeSafeTensors(contents));
    ASSERT_OK_AND_ASSIGN(const SafeTensors read, ParseSafeTensors(bytes));
    EXPECT_EQ(read.tensors.at("x").scalar_type(), type);
    EXPECT_TRUE(torch::equal(read.tensors.at("x"), contents.tensors.at("x"))) << c10::toString(type);
  }
}

TEST(SafeTensors, BoolIsReadAsBytes) {
  SafeTensors contents;
  contents.tensors["flag"] = torch::tensor({true, false, true});
  ASSERT_OK_AND_ASSIGN(const std::string bytes, SerializeSafeTensors(contents));
  EXPECT_THAT(bytes, HasSubstr("\"BOOL\""));
  ASSERT_OK_AND_ASSIGN(const SafeTensors read, ParseSafeTensors(bytes));
  EXPECT_TRUE(torch::equal(read.tensors.at("flag"), torch::tensor({1, 0, 1}, torch::kUInt8)));
}

TEST(SafeTensors, MixedContentsAndMetadataSurviveAndBytesAreDeterministic) {
  const SafeTensors contents = Sample();
  ASSERT_OK_AND_ASSIGN(const std::string bytes, SerializeSafeTensors(contents));
  ASSERT_OK_AND_ASSIGN(const SafeTensors read, ParseSafeTensors(bytes));
  EXPECT_EQ(read.metadata, contents.metadata);
  ASSERT_EQ(read.tensors.size(), contents.tensors.size());
  for (const auto& [name, tensor] : contents.tensors) EXPECT_TRUE(torch::equal(read.tensors.at(name), tensor)) << name;
  EXPECT_THAT(SerializeSafeTensors(read), IsOkAndHolds(bytes));
}

TEST(SafeTensors, DataIsAlignedForEveryElement) {
  ASSERT_OK_AND_ASSIGN(const std::string bytes, SerializeSafeTensors(Sample()));
  EXPECT_EQ(static_cast<uint8_t>(bytes[0]) % 8, 0);
  EXPECT_THAT(bytes, HasSubstr("\"a.odd\":{\"data_offsets\":[32,35]"));
  EXPECT_THAT(bytes, HasSubstr("\"b\":{\"data_offsets\":[8,32]"));
  EXPECT_THAT(bytes, HasSubstr("\"c.scalar\":{\"data_offsets\":[0,8]"));
}

TEST(SafeTensors, NonContiguousTensorsAreWrittenInRowMajorOrder) {
  SafeTensors contents;
  contents.tensors["t"] = torch::arange(6, torch::kFloat32).view({2, 3}).t();
  contents.tensors["s"] = torch::arange(10, torch::kInt32).slice(0, 1, 9, 2);
  ASSERT_OK_AND_ASSIGN(const std::string bytes, SerializeSafeTensors(contents));
  ASSERT_OK_AND_ASSIGN(const SafeTensors read, ParseSafeTensors(bytes));
  EXPECT_TRUE(torch::equal(read.tensors.at("t"), torch::tensor({0., 3., 1., 4., 2., 5.}, torch::kFloat32).view({3, 2})));
  EXPECT_TRUE(torch::equal(read.tensors.at("s"), torch::tensor({1, 3, 5, 7}, torch::kInt32)));
}

TEST(SafeTensors, WhatCannotBeSavedIsRefused) {
  SafeTensors contents;
  contents.tensors["x"] = torch::zeros({2}, torch::kComplexFloat);
  EXPECT_THAT(SerializeSafeTensors(contents), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("x: type")));
  contents.tensors = {{"__metadata__", torch::zeros({2})}};
  EXPECT_THAT(SerializeSafeTensors(contents), StatusIs(absl::StatusCode::kInvalidArgument));
  contents.tensors = {{"x", torch::Tensor()}};
  EXPECT_THAT(SerializeSafeTensors(contents), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("x")));
  contents.tensors = {{"\xFF", torch::zeros({2})}};
  EXPECT_THAT(SerializeSafeTensors(contents), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST(SafeTensors, ReadsFilesThatPythonWrote) {
  ASSERT_OK_AND_ASSIGN(const SafeTensors planet, LoadSafeTensors(SourceFile("tests/golden/golden_planet.safetensors")));
  EXPECT_EQ(planet.metadata.at("T"), "9");
  EXPECT_EQ(planet.tensors.at("batch/image").sizes().vec(), (std::vector<int64_t>{9, 4, 3, 64, 64}));
  EXPECT_EQ(planet.tensors.at("batch/is_first").scalar_type(), torch::kUInt8);
  EXPECT_EQ(planet.tensors.at("expect/loss_total").dim(), 0);
  EXPECT_TRUE(torch::isfinite(planet.tensors.at("expect/deter")).all().item<bool>());
  EXPECT_LE(planet.tensors.at("expect/deter").abs().max().item<float>(), 1.f);
  EXPECT_OK(LoadSafeTensors(SourceFile("tests/golden/golden_planet_elu.safetensors")));
  EXPECT_OK(LoadSafeTensors(SourceFile("tests/golden/golden_mopoe.safetensors")));
}

TEST(SafeTensors, SavesAndLoadsNamingThePath) {
  TempDir dir;
  ASSERT_OK(SaveSafeTensors(dir / "x.safetensors", Sample()));
  ASSERT_OK_AND_ASSIGN(const SafeTensors read, LoadSafeTensors(dir / "x.safetensors"));
  EXPECT_EQ(read.metadata, Sample().metadata);
  EXPECT_THAT(LoadSafeTensors(dir / "none"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
  ASSERT_OK(WriteFileAtomically(dir / "bad", "short"));
  EXPECT_THAT(LoadSafeTensors(dir / "bad"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("/bad: ")));
}

TEST(SafeTensors, EveryTruncationIsDataLoss) {
  ASSERT_OK_AND_ASSIGN(const std::string bytes, SerializeSafeTensors(Sample()));
  for (size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_THAT(ParseSafeTensors(bytes.substr(0, n)), StatusIs(absl::StatusCode::kDataLoss)) << n;
  }
  EXPECT_THAT(ParseSafeTensors(bytes + "x"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("data")));
}

TEST(SafeTensors, RandomDamageIsDataLossOrAnotherValidFile) {
  ASSERT_OK_AND_ASSIGN(const std::string bytes, SerializeSafeTensors(Sample()));
  const size_t header_end = 8 + static_cast<uint8_t>(bytes[0]) + 256 * static_cast<uint8_t>(bytes[1]);
  std::mt19937 random(7);
  int refused = 0;
  for (int i = 0; i < 2000; ++i) {
    std::string damaged = bytes;
    for (int flips = 1 + i % 3; flips > 0; --flips) damaged[random() % header_end] ^= static_cast<char>(1 + random() % 255);
    const auto read = ParseSafeTensors(damaged);
    if (read.ok()) continue;  // a letter of a name or of the metadata
    ++refused;
    EXPECT_THAT(read, StatusIs(absl::StatusCode::kDataLoss));
  }
  EXPECT_GT(refused, 1000);
}

struct Damage {
  std::string header;
  size_t data_bytes;
  std::string message;
};

TEST(SafeTensors, EveryKindOfWrongHeaderIsNamed) {
  const std::string deep(1000, '[');
  const std::vector<Damage> damages = {
      {"[1]", 0, "'{'"},
      {"{}", 1, "tensors take 0"},
      {"{\"x\":", 0, "header"},
      {"{\"x\":" + deep, 0, "too deeply"},
      {"{\"\xFF\":1}", 0, "header"},
      {R"({"x":1})", 0, "x: expected dtype"},
      {R"({"x":{"dtype":"U8","shape":[1]}})", 1, "x: expected dtype"},
      {R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":0}})", 1, "x: expected dtype"},
      {R"({"x":{"dtype":8,"shape":[1],"data_offsets":[0,1]}})", 1, "x: expected dtype"},
      {R"({"x":{"dtype":"F8","shape":[1],"data_offsets":[0,1]}})", 1, "x: type \"F8\""},
      {R"({"x":{"dtype":"U8","shape":1,"data_offsets":[0,1]}})", 1, "x: shape"},
      {R"({"x":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1, "x: shape"},
      {R"({"x":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}})", 1, "x: shape"},
      {R"({"x":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,1]}})", 1, "x: shape"},
      {R"({"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0, "too large"},
      {R"({"x":{"dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}})", 0, "too large"},
      {R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,3]}})", 3, "takes 4"},
      {R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", 1, "x: data_offsets"},
      {R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1, "x: data_offsets"},
      {R"({"x":{"dtype":"U8","shape":[1],"data_offsets":["0",1]}})", 1, "x: data_offsets"},
      {R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", 2, "x: begins at byte 1"},
      {R"({"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", 1, "x: ends at byte 2"},
      {R"({"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"y":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})", 3,
       "y: begins at byte 1"},
      {R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"y":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})", 3,
       "y: begins at byte 2"},
      {R"({"__metadata__":1})", 0, "__metadata__"},
      {R"({"__metadata__":{"k":1}})", 0, "__metadata__.k"},
  };
  for (const Damage& damage : damages) {
    EXPECT_THAT(ParseSafeTensors(File(damage.header, damage.data_bytes)),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr(damage.message)))
        << damage.header;
  }
}

TEST(SafeTensors, HeaderLengthIsBounded) {
  EXPECT_THAT(ParseSafeTensors(std::string(8, '\xFF') + "{}"),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("header length: 18446744073709551615")));
  EXPECT_THAT(ParseSafeTensors(File("{}" + std::string(100'000'000, ' '), 0)),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("expected 2 to 100000000")));
  EXPECT_THAT(ParseSafeTensors(std::string(16, '\0')), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("header length")));
}

}  // namespace
}  // namespace orrery
