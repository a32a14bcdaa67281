#include "libs/envs/gl_context.h"

#include <GL/osmesa.h>
#include <dlfcn.h>

#include <cstdlib>
#include <utility>

#include "absl/base/const_init.h"
#include "absl/cleanup/cleanup.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/envs/egl_display.h"

#ifdef __SANITIZE_ADDRESS__
// Mesa keeps about 150 bytes of every context it has destroyed.
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() { return "leak:libOSMesa\nleak:libEGL\nleak:_dri.so"; }
#endif

namespace orrery {
namespace {

// dm_control's settings.
constexpr int kDepthBits = 24, kStencilBits = 8, kAccumBits = 0;

// One picture at a time: Mesa's software renderer spreads each over all cores by itself, and MuJoCo loads OpenGL's functions
// into process-wide pointers.
ABSL_CONST_INIT absl::Mutex gl_mutex(absl::kConstInit);

class OsMesaContext : public GlContext {
 public:
  static absl::StatusOr<std::unique_ptr<GlContext>> Make() {
    OSMesaContext context = OSMesaCreateContextExt(OSMESA_RGBA, kDepthBits, kStencilBits, kAccumBits, nullptr);
    if (context == nullptr) return absl::InternalError("OSMesa made no OpenGL context");
    return std::unique_ptr<GlContext>(new OsMesaContext(context));
  }
  ~OsMesaContext() override {
    absl::MutexLock lock(&gl_mutex);
    OSMesaDestroyContext(context_);
  }

 private:
  explicit OsMesaContext(OSMesaContext context) : context_(context) {}
  bool MakeCurrent() override { return OSMesaMakeCurrent(context_, window_, GL_UNSIGNED_BYTE, 1, 1); }
  void Release() override { OSMesaMakeCurrent(nullptr, nullptr, GL_UNSIGNED_BYTE, 0, 0); }

  const OSMesaContext context_;
  // Mesa wants a window buffer of its own; MuJoCo draws into a framebuffer object, so one pixel is enough.
  unsigned char window_[4] = {};
};

class EglContext : public GlContext {
 public:
  static absl::StatusOr<std::unique_ptr<GlContext>> Make(EglDisplay& display) {
    ASSIGN_OR_RETURN(void* const context, display.CreateContext());
    return std::unique_ptr<GlContext>(new EglContext(display, context));
  }
  ~EglContext() override {
    absl::MutexLock lock(&gl_mutex);
    display_.DestroyContext(context_);
  }

 private:
  EglContext(EglDisplay& display, void* context) : display_(display), context_(context) {}
  bool MakeCurrent() override { return display_.MakeCurrent(context_); }
  void Release() override { display_.MakeCurrent(nullptr); }

  EglDisplay& display_;
  void* const context_;
};

struct Choice {
  std::unique_ptr<EglDisplay> egl;  // none: OSMesa
  std::string description;
};

// MuJoCo takes the functions that MUJOCO_GL says, if the process has them, else EGL's, else OSMesa's. Corrects the variable
// where that would be the wrong ones.
void TellMujoco(const std::string& said, const char* used) {
  const bool has_egl = dlsym(RTLD_DEFAULT, "eglGetProcAddress") != nullptr;
  const bool finds_it = said == used || (said.empty() && has_egl == (used == std::string("egl")));
  if (!finds_it) setenv("MUJOCO_GL", used, /*overwrite=*/1);
}

Choice ChooseOsMesa(const std::string& said, const std::string& why) {
  TellMujoco(said, "osmesa");
  return {nullptr, absl::StrCat("OSMesa (", why, ")")};
}

Choice Choose() {
  const char* const wanted = std::getenv("MUJOCO_GL");
  const std::string name = wanted == nullptr ? "" : wanted;
  if (name == "osmesa") return ChooseOsMesa(name, "MUJOCO_GL=osmesa");
  const bool forced = name == "egl";
  if (!forced && !name.empty()) LogWarning("MUJOCO_GL is \"{}\", expected egl or osmesa: looking for a GPU", name);
  int device = -1;
  if (const char* const number = std::getenv("MUJOCO_EGL_DEVICE_ID"); number != nullptr && !absl::SimpleAtoi(number, &device)) {
    LogWarning("MUJOCO_EGL_DEVICE_ID is \"{}\", expected a number: any device will do", number);
    device = -1;
  }
  absl::StatusOr<std::unique_ptr<EglDisplay>> egl = EglDisplay::Open(/*software=*/forced, device);
  if (!egl.ok()) {
    const std::string why(egl.status().message());
    if (forced) LogWarning("MUJOCO_GL=egl, but drawing with OSMesa: {}", why);
    return ChooseOsMesa(name, why);
  }
  (*egl)->Publish();
  TellMujoco(name, "egl");
  const std::string description = absl::StrCat("EGL (", (*egl)->name(), ")");
  return {*std::move(egl), description};
}

const Choice& Chosen() {
  static const Choice* const choice = new Choice(Choose());
  return *choice;
}

}  // namespace

absl::StatusOr<std::unique_ptr<GlContext>> GlContext::Create() {
  const Choice& choice = Chosen();
  absl::MutexLock lock(&gl_mutex);
  if (choice.egl != nullptr) return EglContext::Make(*choice.egl);
  return OsMesaContext::Make();
}

const std::string& GlContext::Description() { return Chosen().description; }

absl::Status GlContext::Run(absl::FunctionRef<absl::Status()> f) {
  absl::MutexLock lock(&gl_mutex);
  if (!MakeCurrent()) return absl::InternalError(absl::StrCat(Description(), " could not make its OpenGL context current"));
  absl::Cleanup release = [this] { Release(); };
  return CatchExceptions("rendering", f);
}

}  // namespace orrery
