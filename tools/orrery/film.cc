#include "tools/orrery/film.h"

#include <webp/encode.h>
#include <webp/mux.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace orrery {

struct FilmWriter::Impl {
  ~Impl() { WebPAnimEncoderDelete(encoder); }
  int height = 0;
  int width = 0;
  int frame_millis = 0;
  int frames = 0;
  WebPAnimEncoder* encoder = nullptr;
};

FilmWriter::FilmWriter(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
FilmWriter::~FilmWriter() = default;

absl::StatusOr<std::unique_ptr<FilmWriter>> FilmWriter::Create(int height, int width, int frame_millis) {
  if (height < 1 || width < 1 || height > WEBP_MAX_DIMENSION || width > WEBP_MAX_DIMENSION || frame_millis < 1) {
    return absl::InvalidArgumentError(
        absl::StrFormat("film of %d x %d pixels, %d ms a frame: expected sizes of 1 to %d and at least 1 ms", height,
                        width, frame_millis, WEBP_MAX_DIMENSION));
  }
  WebPAnimEncoderOptions options;
  if (!WebPAnimEncoderOptionsInit(&options)) return absl::InternalError("libwebp: versions of header and library differ");
  auto impl = std::make_unique<Impl>();
  impl->height = height;
  impl->width = width;
  impl->frame_millis = frame_millis;
  impl->encoder = WebPAnimEncoderNew(width, height, &options);
  if (impl->encoder == nullptr) return absl::ResourceExhaustedError("libwebp: no encoder");
  return std::unique_ptr<FilmWriter>(new FilmWriter(std::move(impl)));
}

absl::Status FilmWriter::AddFrame(const Array& picture) {
  if (picture.dtype != DType::kUInt8 || picture.shape != std::vector<int64_t>{impl_->height, impl_->width, 3} ||
      picture.size() != int64_t{3} * impl_->height * impl_->width) {
    return absl::InvalidArgumentError(absl::StrFormat("frame is %s %s, expected uint8 [%d, %d, 3]", Name(picture.dtype),
                                                      ShapeString(picture.shape), impl_->height, impl_->width));
  }
  WebPConfig config;
  WebPPicture frame;
  if (!WebPConfigInit(&config) || !WebPPictureInit(&frame)) return absl::InternalError("libwebp: cannot begin a frame");
  config.quality = 80;
  frame.use_argb = 1;
  frame.width = impl_->width;
  frame.height = impl_->height;
  const bool ok =
      WebPPictureImportRGB(&frame, reinterpret_cast<const uint8_t*>(picture.bytes.data()), 3 * impl_->width) &&
      WebPAnimEncoderAdd(impl_->encoder, &frame, impl_->frames * impl_->frame_millis, &config);
  WebPPictureFree(&frame);
  if (!ok) return absl::InternalError(absl::StrCat("libwebp: ", WebPAnimEncoderGetError(impl_->encoder)));
  impl_->frames += 1;
  return absl::OkStatus();
}

absl::StatusOr<std::string> FilmWriter::Finish() {
  if (impl_->frames == 0) return absl::FailedPreconditionError("a film needs at least one frame");
  WebPData data;
  WebPDataInit(&data);
  const bool ok = WebPAnimEncoderAdd(impl_->encoder, nullptr, impl_->frames * impl_->frame_millis, nullptr) &&
                  WebPAnimEncoderAssemble(impl_->encoder, &data);
  std::string file = ok ? std::string(reinterpret_cast<const char*>(data.bytes), data.size) : std::string();
  WebPDataClear(&data);
  if (!ok) return absl::InternalError(absl::StrCat("libwebp: ", WebPAnimEncoderGetError(impl_->encoder)));
  return file;
}

Array Enlarge(const Array& picture, int factor) {
  const int64_t h = picture.shape[0], w = picture.shape[1];
  Array large{DType::kUInt8, {h * factor, w * factor, 3}, std::string()};
  large.bytes.reserve(picture.bytes.size() * factor * factor);
  for (int64_t y = 0; y < h; ++y) {
    std::string row;
    for (int64_t x = 0; x < w; ++x) {
      for (int i = 0; i < factor; ++i) row.append(picture.bytes, static_cast<size_t>(3 * (y * w + x)), 3);
    }
    for (int i = 0; i < factor; ++i) large.bytes += row;
  }
  return large;
}

Array Above(const Array& top, const Array& bottom) {
  return {DType::kUInt8, {top.shape[0] + bottom.shape[0], top.shape[1], 3}, top.bytes + bottom.bytes};
}

}  // namespace orrery
