#include "libs/replay/sequence_batch.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "libs/base/file.h"
#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;
using Slices = std::vector<std::vector<SequenceBatch::Slice>>;

// Row r of episode e: a picture that changes a little from row to row, so that it is stored compressed, and a number.
constexpr int kPixels = 400;
uint8_t Pixel(int64_t episode, int64_t row, int i) {
  return static_cast<uint8_t>(episode * 50 + i / 20 + (i % 37 == row % 37));
}
float Number(int64_t episode, int64_t row) { return static_cast<float>(episode * 1000 + row); }

ArrayMap Rows(int64_t episode, int64_t first_row, int rows) {
  ArrayMap fields = {{"image", Array::Zeros(DType::kUInt8, {rows, 20, 20})}, {"number", Array::Zeros(DType::kFloat32, {rows})}};
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < kPixels; ++i) {
      fields["image"].mutable_as<uint8_t>()[r * kPixels + i] = Pixel(episode, first_row + r, i);
    }
    fields["number"].mutable_as<float>()[r] = Number(episode, first_row + r);
  }
  return fields;
}

SequenceBatch::Source Source(int64_t episode, int64_t first_row, int rows, const ArrayMap& fields) {
  absl::StatusOr<EncodedRows> encoded = EncodedRows::Open(*EncodeRows(fields), rows);
  EXPECT_OK(encoded);
  return {{episode, first_row}, std::make_shared<const EncodedRows>(*std::move(encoded))};
}

SequenceBatch::Source Source(int64_t episode, int64_t first_row, int rows) {
  return Source(episode, first_row, rows, Rows(episode, first_row, rows));
}

TEST(SequenceBatch, CutsSequencesOutOfTheirChunks) {
  // Sequences of 6 rows: inside one chunk, over two, over three, a whole chunk's rows twice, single rows.
  const std::vector<SequenceBatch::Source> chunks = {Source(1, 0, 10), Source(1, 10, 2), Source(1, 12, 10), Source(2, 30, 6)};
  const Slices slices = {{{0, 2, 6}}, {{0, 6, 4}, {1, 0, 2}}, {{0, 9, 1}, {1, 0, 2}, {2, 0, 3}}, {{3, 0, 6}}, {{2, 4, 6}}};
  const std::vector<std::pair<int64_t, int64_t>> starts = {{1, 2}, {1, 6}, {1, 9}, {2, 30}, {1, 16}};
  ASSERT_OK_AND_ASSIGN(const SequenceBatch batch, SequenceBatch::Create(chunks, slices));
  EXPECT_EQ(batch.length(), 6);
  // What lay there before must not show.
  ArrayMap all = {{"image", Array::From<uint8_t>(std::vector<uint8_t>(50000, 7), {50000})},
                  {"other", Array::Zeros(DType::kUInt8, {3})}};
  ASSERT_OK(batch.ReadAll(all));
  ASSERT_EQ(all.size(), 2u);
  ASSERT_EQ(all["image"].dtype, DType::kUInt8);
  ASSERT_EQ(all["image"].shape, (std::vector<int64_t>{5, 6, 20, 20}));
  ASSERT_EQ(all["number"].shape, (std::vector<int64_t>{5, 6}));
  ASSERT_EQ(all["image"].size(), 5 * 6 * kPixels);
  for (size_t s = 0; s < starts.size(); ++s) {
    for (int t = 0; t < 6; ++t) {
      const auto [episode, first] = starts[s];
      EXPECT_EQ(all["number"].as<float>()[s * 6 + t], Number(episode, first + t));
      for (int i = 0; i < kPixels; ++i) {
        ASSERT_EQ(all["image"].as<uint8_t>()[(s * 6 + t) * kPixels + i], Pixel(episode, first + t, i)) << s << " " << t;
      }
    }
  }
  // Some sequences of one field are the same bytes.
  std::string part(3 * 6 * kPixels, '\0');
  ASSERT_EQ(batch.fields()[0].name, "image");
  ASSERT_OK(batch.Read(0, 1, 3, part.data()));
  EXPECT_EQ(part, all["image"].bytes.substr(6 * kPixels, part.size()));
}

TEST(SequenceBatch, ReadsEveryRangeOfRowsLikeTheWhole) {
  std::mt19937_64 random(1);
  ArrayMap fields = Rows(1, 0, 13);
  fields["noise"] = Array::Zeros(DType::kUInt8, {13, 300});
  for (char& byte : fields["noise"].bytes) byte = static_cast<char>(random());
  const SequenceBatch::Source source = Source(1, 0, 13, fields);
  for (size_t f = 0; f < 3; ++f) {
    const EncodedRows::Field& field = source.rows->fields()[f];
    EXPECT_EQ(field.compressed, field.name == "image");
    for (int64_t begin = 0; begin <= 13; ++begin) {
      for (int64_t count = 0; begin + count <= 13; ++count) {
        std::string bytes(count * field.row_bytes, '\x55');
        ASSERT_OK(source.rows->Read(f, begin, count, bytes.data()));
        ASSERT_EQ(bytes, fields[field.name].bytes.substr(begin * field.row_bytes, bytes.size())) << field.name << " " << begin;
      }
    }
  }
}

TEST(SequenceBatch, SaysWhereItsSequencesBegin) {
  const std::vector<SequenceBatch::Source> chunks = {Source(1, 0, 5), Source(2, 30, 5)};
  const Slices slices = {{{1, 3, 2}}, {{0, 4, 1}, {0, 0, 1}}};
  using Starts = std::vector<SequenceBatch::Start>;
  ASSERT_OK_AND_ASSIGN(const SequenceBatch unknown, SequenceBatch::Create(chunks, slices));
  EXPECT_EQ(unknown.Starts(), (Starts{{{2, 30}, 3, 0}, {{1, 0}, 4, 0}}));
  ASSERT_OK_AND_ASSIGN(const SequenceBatch batch, SequenceBatch::Create(chunks, slices, {0.25, 1}));
  EXPECT_EQ(batch.Starts(), (Starts{{{2, 30}, 3, 0.25}, {{1, 0}, 4, 1}}));
  const auto refuse = [&](std::vector<double> probabilities, const std::string& words) {
    EXPECT_THAT(SequenceBatch::Create(chunks, slices, std::move(probabilities)),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(words)));
  };
  refuse({0.5}, "1 probabilities: expected one for each of 2 sequences");
  refuse({0.5, -0.5}, "a sequence of probability -0.5: expected 0 to 1");
  refuse({1.5, 0.5}, "a sequence of probability 1.5");
  refuse({std::numeric_limits<double>::quiet_NaN(), 0.5}, "a sequence of probability nan");
}

TEST(SequenceBatch, RefusesWhatDoesNotFit) {
  const std::vector<SequenceBatch::Source> chunks = {Source(1, 0, 5), Source(1, 5, 5)};
  const auto refuse = [](std::vector<SequenceBatch::Source> of, Slices slices, absl::StatusCode code,
                         const std::string& words) {
    EXPECT_THAT(SequenceBatch::Create(std::move(of), std::move(slices)), StatusIs(code, HasSubstr(words)));
  };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument, kLoss = absl::StatusCode::kDataLoss;
  EXPECT_OK(SequenceBatch::Create(chunks, {{{0, 3, 2}, {1, 0, 1}}}));
  refuse({}, {}, kInvalid, "without a sequence");
  refuse(chunks, {}, kInvalid, "without a sequence");
  refuse(chunks, {{}}, kInvalid, "without a row");
  refuse(chunks, {{{0, 0, 2}}, {{0, 0, 3}}}, kInvalid, "a sequence of 3 rows: expected 2");
  refuse(chunks, {{{2, 0, 1}}}, kLoss, "chunk 2: expected 0 to 1");
  refuse(chunks, {{{-1, 0, 1}}}, kLoss, "chunk -1");
  refuse(chunks, {{{0, 3, 3}}}, kLoss, "3 rows from row 3 of the chunk of episode 1 at row 0: expected rows of its 5");
  refuse(chunks, {{{0, -1, 3}}}, kLoss, "from row -1");
  refuse(chunks, {{{0, 0, 0}}}, kLoss, "0 rows");
  refuse(chunks, {{{1, 2147483647, 2147483647}}}, kLoss, "2147483647 rows");

  ArrayMap fields = Rows(1, 5, 5);
  fields.erase("number");
  refuse({chunks[0], Source(1, 5, 5, fields)}, {{{0, 0, 1}}}, kLoss, "at row 5 has 1 fields: expected 2");
  fields["nombre"] = Array::Zeros(DType::kFloat32, {5});
  refuse({chunks[0], Source(1, 5, 5, fields)}, {{{0, 0, 1}}}, kLoss, "a field \"nombre\": expected \"number\"");
  fields.erase("nombre");
  fields["number"] = Array::Zeros(DType::kFloat32, {5, 2});
  refuse({chunks[0], Source(1, 5, 5, fields)}, {{{0, 0, 1}}}, kLoss, "\"number\" is float32 [2]: expected float32 []");
}

TEST(SequenceBatch, RefusesABatchThatIsTooLarge) {
  // 512 rows of 2 MiB are just the limit.
  const std::vector<SequenceBatch::Source> chunks = {
      Source(1, 0, 2, {{"zeros", Array::Zeros(DType::kUInt8, {2, 2 << 20})}})};
  EXPECT_OK(SequenceBatch::Create(chunks, Slices(512, {{0, 1, 1}})));
  EXPECT_THAT(SequenceBatch::Create(chunks, Slices(513, {{0, 1, 1}})),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("513 sequences of 1 rows of 2097152 bytes")));
}

TEST(SequenceBatch, SaysWhichChunkIsDamaged) {
  // Behind a right layout and checksum.
  std::string payload = *EncodeRows(Rows(3, 7, 40));
  ASSERT_OK_AND_ASSIGN(const EncodedRows good, EncodedRows::Open(payload, 40));
  const EncodedRows::Field& image = good.fields()[0];
  ASSERT_TRUE(image.compressed);
  int damaged = 0;
  for (size_t at = image.offset + 10; at < image.offset + image.length; ++at) {
    std::string changed = payload;
    changed[at] = static_cast<char>(changed[at] ^ 0xff);
    const uint32_t checksum = Checksum(absl::string_view(changed).substr(0, changed.size() - 4));
    changed.replace(changed.size() - 4, 4, reinterpret_cast<const char*>(&checksum), 4);
    absl::StatusOr<EncodedRows> rows = EncodedRows::Open(changed, 40);
    if (!rows.ok()) continue;
    const SequenceBatch::Source source = {{3, 7}, std::make_shared<const EncodedRows>(*std::move(rows))};
    ASSERT_OK_AND_ASSIGN(const SequenceBatch batch, SequenceBatch::Create({source}, {{{0, 0, 40}}}));
    ArrayMap all;
    const absl::Status status = batch.ReadAll(all);
    if (status.ok()) continue;  // another picture, but one
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kDataLoss, HasSubstr("chunk of episode 3 at row 7: ")));
    ++damaged;
  }
  EXPECT_GT(damaged, 0);
}

}  // namespace
}  // namespace orrery
