#include "libs/replay/chunk_codec.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "absl/strings/str_cat.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

// A ball on a still background: what a camera gives.
Array Pictures(int rows, int size) {
  Array a = Array::Zeros(DType::kUInt8, {rows, size, size, 3});
  auto x = a.mutable_as<uint8_t>();
  for (int t = 0; t < rows; ++t) {
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j < size; ++j) {
        const bool ball = (i - size / 2) * (i - size / 2) + (j - t) * (j - t) < 20;
        for (int c = 0; c < 3; ++c) x[((t * size + i) * size + j) * 3 + c] = ball ? 200 : (i * 3 + j * c) % 256;
      }
    }
  }
  return a;
}

Array Noise(DType dtype, std::vector<int64_t> shape, uint64_t seed) {
  Array a = Array::Zeros(dtype, std::move(shape));
  std::mt19937_64 random(seed);
  for (char& c : a.bytes) c = static_cast<char>(random());
  return a;
}

ArrayMap Rows(int rows, int size) {
  return {{"image", Pictures(rows, size)},
          {"joints", Noise(DType::kFloat32, {rows, 26}, 1)},
          {kAction, Noise(DType::kFloat32, {rows, 6}, 2)},
          {kReward, Noise(DType::kFloat32, {rows}, 3)},
          {kIsFirst, Noise(DType::kUInt8, {rows}, 4)},
          {kIsTerminal, Noise(DType::kUInt8, {rows}, 5)}};
}

// A payload with its checksum made right again.
std::string Seal(std::string payload) {
  payload.resize(payload.size() - 4);
  const uint32_t crc = Checksum(payload);
  return payload + std::string(reinterpret_cast<const char*>(&crc), 4);
}

TEST(ChunkCodec, GivesBackEveryBit) {
  for (const int rows : {1, 2, 50}) {
    const ArrayMap fields = Rows(rows, 32);
    ASSERT_OK_AND_ASSIGN(const std::string payload, EncodeRows(fields));
    EXPECT_THAT(DecodeRows(payload, rows), IsOkAndHolds(fields));
  }
}

TEST(ChunkCodec, KeepsEveryDTypeAndRank) {
  const ArrayMap fields = {{"u8", Noise(DType::kUInt8, {3, 1000}, 1)},
                           {"i32", Noise(DType::kInt32, {3, 2, 2}, 2)},
                           {"i64", Noise(DType::kInt64, {3}, 3)},
                           {"f32", Noise(DType::kFloat32, {3, 1, 2, 1, 2, 1, 2, 1, 2}, 4)},
                           {"f64", Noise(DType::kFloat64, {3, 300}, 5)},
                           {"empty", Noise(DType::kFloat32, {3, 0}, 6)}};
  ASSERT_OK_AND_ASSIGN(const std::string payload, EncodeRows(fields));
  EXPECT_THAT(DecodeRows(payload, 3), IsOkAndHolds(fields));
}

TEST(ChunkCodec, PacksPicturesAndLeavesNoiseAlone) {
  const ArrayMap pictures = {{"image", Pictures(50, 64)}};
  ASSERT_OK_AND_ASSIGN(const std::string small, EncodeRows(pictures));
  EXPECT_LT(small.size(), pictures.at("image").bytes.size() / 10);
  const ArrayMap noise = {{"image", Noise(DType::kUInt8, {50, 64, 64, 3}, 7)}};
  ASSERT_OK_AND_ASSIGN(const std::string big, EncodeRows(noise));
  EXPECT_LT(big.size(), noise.at("image").bytes.size() + 100);
}

TEST(ChunkCodec, RefusesFieldsThatDoNotFit) {
  EXPECT_THAT(EncodeRows({}), StatusIs(absl::StatusCode::kInvalidArgument));
  ArrayMap fields = Rows(3, 16);
  fields[kReward] = Noise(DType::kFloat32, {4}, 1);
  EXPECT_THAT(EncodeRows(fields), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("'reward' [4]: expected 3 rows")));
  fields[kReward] = Array{DType::kFloat32, {3}, "x"};
  EXPECT_THAT(EncodeRows(fields), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("reward")));
  EXPECT_THAT(EncodeRows({{"a", Array{DType::kFloat32, {0}, ""}}}), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(EncodeRows({{"a", Array{DType::kFloat32, {}, "1234"}}}), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(EncodeRows({{"", Noise(DType::kUInt8, {1}, 1)}}), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST(ChunkCodec, FindsDamageAtEveryByte) {
  ASSERT_OK_AND_ASSIGN(const std::string payload, EncodeRows(Rows(4, 16)));
  for (size_t i = 0; i < payload.size(); ++i) {
    std::string damaged = payload;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x41);
    ASSERT_THAT(DecodeRows(damaged, 4), StatusIs(absl::StatusCode::kDataLoss)) << "byte " << i;
    ASSERT_THAT(DecodeRows(payload.substr(0, i), 4), StatusIs(absl::StatusCode::kDataLoss)) << "cut at " << i;
  }
}

// Behind a right checksum everything else must hold by itself: no crash, no allocation beyond the limit.
TEST(ChunkCodec, SurvivesDamageBehindARightChecksum) {
  ASSERT_OK_AND_ASSIGN(const std::string payload, EncodeRows(Rows(4, 16)));
  int refused = 0;
  for (size_t i = 0; i + 4 < payload.size(); ++i) {
    for (const int flip : {0x01, 0x80, 0xff}) {
      std::string damaged = payload;
      damaged[i] = static_cast<char>(damaged[i] ^ flip);
      const auto rows = DecodeRows(Seal(damaged), 4, 1 << 20);
      if (!rows.ok()) {
        ASSERT_THAT(rows, StatusIs(absl::StatusCode::kDataLoss)) << "byte " << i;
        ++refused;
      }
    }
  }
  EXPECT_GT(refused, 50);
}

TEST(ChunkCodec, RefusesHugeClaimsWithoutAllocating) {
  ASSERT_OK_AND_ASSIGN(const std::string payload, EncodeRows({{"x", Noise(DType::kUInt8, {2, 8}, 1)}}));
  const size_t size_at = 12 + 1 + 1 + 3;  // header, name length, name, dtype, encoding and rank
  std::string damaged = payload;
  damaged.replace(size_at, 4, "\xff\xff\xff\xff");
  EXPECT_THAT(DecodeRows(Seal(damaged), 2), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("claims 8589934590 bytes")));
  // A compressed field whose frame expands to more than its shape says.
  ASSERT_OK_AND_ASSIGN(const std::string bomb,
                       EncodeRows({{"x", Array::Zeros(DType::kUInt8, {2, 1 << 20})}}));
  EXPECT_LT(bomb.size(), 2000);
  damaged = bomb;
  damaged.replace(size_at, 4, std::string("\x00\x10\x00\x00", 4));
  EXPECT_THAT(DecodeRows(Seal(damaged), 2), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("compressed field")));
  EXPECT_THAT(DecodeRows(bomb, 2, 1 << 20), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("claims")));
  EXPECT_OK(DecodeRows(bomb, 2, 2 << 20));
}

// What is checked before a chunk is stored is what decoding would find.
TEST(ChunkCodec, ChecksAPayloadAsIfItWereDecoded) {
  ASSERT_OK_AND_ASSIGN(const std::string payload, EncodeRows(Rows(4, 16)));
  EXPECT_OK(CheckPayload(payload, 4, 1 << 20));
  EXPECT_THAT(CheckPayload(payload, 4, 1000), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("claims")));
  ASSERT_OK_AND_ASSIGN(const std::string no_action, EncodeRows({{"image", Pictures(4, 16)}}));
  EXPECT_THAT(CheckPayload(no_action, 4, 1 << 20), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is missing")));
  int refused = 0;
  for (size_t i = 0; i + 4 < payload.size(); ++i) {
    std::string damaged = payload;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x80);
    damaged = Seal(damaged);
    const absl::StatusOr<ArrayMap> rows = DecodeRows(damaged, 4, 1 << 20);
    const absl::Status expected = rows.ok() ? CheckRows(*rows) : rows.status();
    ASSERT_EQ(CheckPayload(damaged, 4, 1 << 20).ok(), expected.ok()) << "byte " << i << ": " << expected;
    refused += !expected.ok();
  }
  EXPECT_GT(refused, 50);
}

TEST(ChunkCodec, OpensWithoutDecodingAndReadsRows) {
  const ArrayMap fields = Rows(5, 32);
  ASSERT_OK_AND_ASSIGN(const std::string payload, EncodeRows(fields));
  ASSERT_OK_AND_ASSIGN(EncodedRows opened, EncodedRows::Open(payload, 5));
  const EncodedRows rows = std::move(opened);  // it holds its payload
  EXPECT_EQ(rows.payload(), payload);
  ASSERT_EQ(rows.fields().size(), fields.size());
  auto expected = fields.begin();
  for (size_t i = 0; i < fields.size(); ++i, ++expected) {
    const EncodedRows::Field& field = rows.fields()[i];
    EXPECT_EQ(field.name, expected->first);
    EXPECT_EQ(field.dtype, expected->second.dtype);
    EXPECT_EQ(field.row_shape, std::vector<int64_t>(expected->second.shape.begin() + 1, expected->second.shape.end()));
    std::string bytes(2 * field.row_bytes, '\0');
    ASSERT_OK(rows.Read(i, 2, 2, bytes.data()));
    EXPECT_EQ(bytes, expected->second.bytes.substr(2 * field.row_bytes, bytes.size()));
  }
  EXPECT_THAT(EncodedRows::Open(payload, 4), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("5 rows, expected 4")));
  EXPECT_THAT(EncodedRows::Open(payload.substr(1), 5), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("checksum")));
}

// One field may be larger than what a thread keeps for decoding.
TEST(ChunkCodec, GivesBackLargeFields) {
  const ArrayMap fields = {{"image", Pictures(90, 128)}};
  ASSERT_GT(fields.at("image").bytes.size(), 4u << 20);
  ASSERT_OK_AND_ASSIGN(const std::string payload, EncodeRows(fields));
  EXPECT_THAT(DecodeRows(payload, 90), IsOkAndHolds(fields));
}

TEST(ChunkCodec, RefusesAnotherNumberOfRowsOrVersion) {
  ASSERT_OK_AND_ASSIGN(std::string payload, EncodeRows(Rows(4, 16)));
  EXPECT_THAT(DecodeRows(payload, 5), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("4 rows, expected 5")));
  payload[4] = 2;
  EXPECT_THAT(DecodeRows(Seal(payload), 4), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("version 2, expected 1")));
}

TEST(ChunkCodec, NamesTheFieldThatALearnerMisses) {
  const ArrayMap good = Rows(3, 8);
  EXPECT_OK(CheckRows(good));
  const auto refuse = [&](auto change, const std::string& words) {
    ArrayMap rows = good;
    change(rows);
    EXPECT_THAT(CheckRows(rows), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(words)));
  };
  for (const char* name : {kAction, kReward, kIsFirst, kIsTerminal}) {
    refuse([&](ArrayMap& rows) { rows.erase(name); }, absl::StrCat("field \"", name, "\" is missing"));
  }
  refuse([](ArrayMap& rows) { rows[kReward] = Noise(DType::kFloat64, {3}, 1); },
         "field \"reward\" is float64 [3]: expected float32 with 1 dimension(s)");
  refuse([](ArrayMap& rows) { rows[kAction] = Noise(DType::kFloat32, {3}, 1); },
         "field \"action\" is float32 [3]: expected float32 with 2 dimension(s)");
  refuse(
      [](ArrayMap& rows) {
        rows.erase("image");
        rows.erase("joints");
      },
      "no observation");
}

}  // namespace
}  // namespace orrery
