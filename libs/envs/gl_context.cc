#include "libs/envs/gl_context.h"

#include <GL/osmesa.h>

#include "absl/base/const_init.h"
#include "absl/cleanup/cleanup.h"
#include "absl/synchronization/mutex.h"
#include "libs/base/status.h"

#ifdef __SANITIZE_ADDRESS__
// Mesa keeps about 150 bytes of every context it has destroyed.
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() { return "leak:libOSMesa"; }
#endif

namespace orrery {
namespace {

// dm_control's settings.
constexpr int kDepthBits = 24, kStencilBits = 8, kAccumBits = 0;

// One picture at a time: Mesa's software renderer spreads each over all cores by itself, and MuJoCo loads OpenGL's functions
// into process-wide pointers.
ABSL_CONST_INIT absl::Mutex gl_mutex(absl::kConstInit);

}  // namespace

absl::StatusOr<std::unique_ptr<GlContext>> GlContext::Create() {
  absl::MutexLock lock(&gl_mutex);
  OSMesaContext context = OSMesaCreateContextExt(OSMESA_RGBA, kDepthBits, kStencilBits, kAccumBits, nullptr);
  if (context == nullptr) return absl::InternalError("OSMesa made no OpenGL context");
  return std::unique_ptr<GlContext>(new GlContext(context));
}

GlContext::~GlContext() {
  absl::MutexLock lock(&gl_mutex);
  OSMesaDestroyContext(static_cast<OSMesaContext>(context_));
}

absl::Status GlContext::Run(absl::FunctionRef<absl::Status()> f) {
  absl::MutexLock lock(&gl_mutex);
  if (!OSMesaMakeCurrent(static_cast<OSMesaContext>(context_), window_, GL_UNSIGNED_BYTE, 1, 1)) {
    return absl::InternalError("OSMesa could not make its OpenGL context current");
  }
  absl::Cleanup release = [] { OSMesaMakeCurrent(nullptr, nullptr, GL_UNSIGNED_BYTE, 0, 0); };
  return CatchExceptions("rendering", f);
}

}  // namespace orrery
