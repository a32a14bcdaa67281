// Animated WebP from pictures, and the film of an episode: what the agent saw above what it imagined.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "libs/base/array.h"

namespace orrery {

// Puts pictures into an animated WebP. Not thread-safe.
class FilmWriter {
 public:
  // Every frame is shown for `frame_millis`. INVALID_ARGUMENT for a size outside 1 to 16383.
  static absl::StatusOr<std::unique_ptr<FilmWriter>> Create(int height, int width, int frame_millis);
  ~FilmWriter();
  // [height, width, 3] uint8. INVALID_ARGUMENT for another shape.
  absl::Status AddFrame(const Array& picture);
  // The file. FAILED_PRECONDITION without a frame. Call once.
  absl::StatusOr<std::string> Finish();

 private:
  struct Impl;
  explicit FilmWriter(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// A picture [h, w, 3] uint8 with every pixel repeated `factor` times in both directions.
Array Enlarge(const Array& picture, int factor);
// Two pictures [h, w, 3] uint8 of the same width, one above the other.
Array Above(const Array& top, const Array& bottom);

}  // namespace orrery
