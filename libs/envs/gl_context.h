// Off-screen OpenGL in software.
#pragma once

#include <memory>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace orrery {

// An OSMesa context. Any thread may use it; calls on all contexts of the process run one at a time. INTERNAL when Mesa
// refuses or `f` throws.
class GlContext {
 public:
  static absl::StatusOr<std::unique_ptr<GlContext>> Create();
  ~GlContext();
  GlContext(const GlContext&) = delete;
  GlContext& operator=(const GlContext&) = delete;

  // Runs `f` with the context current in this thread, and releases it.
  absl::Status Run(absl::FunctionRef<absl::Status()> f);

 private:
  // OSMesaContext is a pointer to an opaque struct; <GL/osmesa.h> stays in the source file.
  explicit GlContext(void* context) : context_(context) {}

  void* const context_;
  // Mesa wants a window buffer of its own; MuJoCo draws into a framebuffer object, so one pixel is enough.
  unsigned char window_[4] = {};
};

}  // namespace orrery
