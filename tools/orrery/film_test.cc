#include "tools/orrery/film.h"

#include <gtest/gtest.h>
#include <webp/demux.h>

#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

Array Plain(int height, int width, uint8_t red, uint8_t green, uint8_t blue) {
  Array picture = Array::Zeros(DType::kUInt8, {height, width, 3});
  for (int64_t i = 0; i < int64_t{height} * width; ++i) {
    picture.mutable_as<uint8_t>()[3 * i] = red;
    picture.mutable_as<uint8_t>()[3 * i + 1] = green;
    picture.mutable_as<uint8_t>()[3 * i + 2] = blue;
  }
  return picture;
}

TEST(FilmWriter, WritesEveryFrameAtItsTime) {
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<FilmWriter> film, FilmWriter::Create(20, 32, 40));
  ASSERT_OK(film->AddFrame(Plain(20, 32, 250, 5, 5)));
  ASSERT_OK(film->AddFrame(Plain(20, 32, 5, 250, 5)));
  ASSERT_OK(film->AddFrame(Plain(20, 32, 5, 5, 250)));
  ASSERT_OK_AND_ASSIGN(const std::string file, film->Finish());

  WebPData data{reinterpret_cast<const uint8_t*>(file.data()), file.size()};
  WebPAnimDecoder* decoder = WebPAnimDecoderNew(&data, nullptr);
  ASSERT_NE(decoder, nullptr);
  WebPAnimInfo info;
  ASSERT_TRUE(WebPAnimDecoderGetInfo(decoder, &info));
  EXPECT_EQ(info.frame_count, 3u);
  EXPECT_EQ(info.canvas_width, 32u);
  EXPECT_EQ(info.canvas_height, 20u);
  for (int frame = 0; frame < 3; ++frame) {
    uint8_t* pixels = nullptr;
    int until_millis = 0;
    ASSERT_TRUE(WebPAnimDecoderGetNext(decoder, &pixels, &until_millis));
    EXPECT_EQ(until_millis, 40 * (frame + 1));
    const uint8_t* middle = pixels + 4 * (10 * 32 + 16);
    for (int channel = 0; channel < 3; ++channel) {
      EXPECT_NEAR(middle[channel], channel == frame ? 250 : 5, 12) << "frame " << frame << " channel " << channel;
    }
  }
  EXPECT_FALSE(WebPAnimDecoderHasMoreFrames(decoder));
  WebPAnimDecoderDelete(decoder);
}

TEST(FilmWriter, RefusesFramesOfAnotherShape) {
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<FilmWriter> film, FilmWriter::Create(8, 8, 40));
  EXPECT_THAT(film->AddFrame(Plain(8, 9, 0, 0, 0)), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(film->AddFrame(Array::Zeros(DType::kFloat32, {8, 8, 3})), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(film->Finish(), StatusIs(absl::StatusCode::kFailedPrecondition));
}

TEST(FilmWriter, RefusesSizesThatWebpCannotHold) {
  EXPECT_THAT(FilmWriter::Create(0, 8, 40), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(FilmWriter::Create(8, 20000, 40), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST(Enlarge, RepeatsEveryPixel) {
  const Array two = Array::From<uint8_t>({1, 2, 3, 4, 5, 6}, {1, 2, 3});
  const Array large = Enlarge(two, 2);
  EXPECT_EQ(large.shape, (std::vector<int64_t>{2, 4, 3}));
  EXPECT_EQ(large, Array::From<uint8_t>({1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6, 1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6},
                                        {2, 4, 3}));
}

TEST(Above, PutsTheFirstOnTop) {
  const Array top = Array::From<uint8_t>({1, 2, 3}, {1, 1, 3});
  const Array bottom = Array::From<uint8_t>({4, 5, 6}, {1, 1, 3});
  EXPECT_EQ(Above(top, bottom), Array::From<uint8_t>({1, 2, 3, 4, 5, 6}, {2, 1, 3}));
}

}  // namespace
}  // namespace orrery
