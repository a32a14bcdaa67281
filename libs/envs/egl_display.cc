#include "libs/envs/egl_display.h"

#include <dlfcn.h>

#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

constexpr char kLibrary[] = "libEGL.so.1";

// Of the EGL 1.5 registry: no header is needed to build.
constexpr unsigned kOpenGlApi = 0x30A2, kPlatformDevice = 0x313F;
constexpr int32_t kVendor = 0x3053, kExtensions = 0x3055, kNone = 0x3038;
// dm_control's settings: 8 bits for each colour, 24 of depth, 8 of stencil.
constexpr int32_t kConfigAttributes[] = {0x3024, 8,       // EGL_RED_SIZE
                                         0x3023, 8,       // EGL_GREEN_SIZE
                                         0x3022, 8,       // EGL_BLUE_SIZE
                                         0x3021, 8,       // EGL_ALPHA_SIZE
                                         0x3025, 24,      // EGL_DEPTH_SIZE
                                         0x3026, 8,       // EGL_STENCIL_SIZE
                                         0x303F, 0x308E,  // EGL_COLOR_BUFFER_TYPE: EGL_RGB_BUFFER
                                         0x3033, 0x0001,  // EGL_SURFACE_TYPE: EGL_PBUFFER_BIT
                                         0x3040, 0x0008,  // EGL_RENDERABLE_TYPE: EGL_OPENGL_BIT
                                         kNone};

bool Has(const char* extensions, absl::string_view name) {
  if (extensions == nullptr) return false;
  for (const absl::string_view word : absl::StrSplit(extensions, ' ')) {
    if (word == name) return true;
  }
  return false;
}

}  // namespace

struct EglDisplay::Functions {
  unsigned (*BindAPI)(unsigned api);
  unsigned (*ChooseConfig)(void* display, const int32_t* attributes, void** configs, int32_t size, int32_t* count);
  void* (*CreateContext)(void* display, void* config, void* share, const int32_t* attributes);
  unsigned (*DestroyContext)(void* display, void* context);
  int32_t (*GetError)();
  void* (*GetPlatformDisplay)(unsigned platform, void* device, const int32_t* attributes);
  unsigned (*Initialize)(void* display, int32_t* major, int32_t* minor);
  unsigned (*MakeCurrent)(void* display, void* draw, void* read, void* context);
  unsigned (*QueryDevices)(int32_t size, void** devices, int32_t* count);
  const char* (*QueryDeviceString)(void* device, int32_t name);
  const char* (*QueryString)(void* display, int32_t name);

  static absl::StatusOr<std::shared_ptr<const Functions>> Load();
};

absl::StatusOr<std::shared_ptr<const EglDisplay::Functions>> EglDisplay::Functions::Load() {
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return absl::UnavailableError(absl::StrCat(kLibrary, " cannot be loaded: ", dlerror()));
  using Function = void (*)();
  const auto get_address = reinterpret_cast<Function (*)(const char*)>(dlsym(library, "eglGetProcAddress"));
  if (get_address == nullptr) return absl::UnavailableError(absl::StrCat(kLibrary, " has no eglGetProcAddress"));
  std::string missing;
  const auto load = [&](auto& function, const char* name, bool extension) {
    function = extension ? reinterpret_cast<std::decay_t<decltype(function)>>(get_address(name))
                         : reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr) absl::StrAppend(&missing, " ", name);
  };
  auto functions = std::make_shared<Functions>();
  load(functions->BindAPI, "eglBindAPI", false);
  load(functions->ChooseConfig, "eglChooseConfig", false);
  load(functions->CreateContext, "eglCreateContext", false);
  load(functions->DestroyContext, "eglDestroyContext", false);
  load(functions->GetError, "eglGetError", false);
  load(functions->GetPlatformDisplay, "eglGetPlatformDisplayEXT", true);
  load(functions->Initialize, "eglInitialize", false);
  load(functions->MakeCurrent, "eglMakeCurrent", false);
  load(functions->QueryDevices, "eglQueryDevicesEXT", true);
  load(functions->QueryDeviceString, "eglQueryDeviceStringEXT", true);
  load(functions->QueryString, "eglQueryString", false);
  if (!missing.empty()) return absl::UnavailableError(absl::StrCat(kLibrary, " lacks", missing));
  return functions;
}

EglDisplay::EglDisplay(std::shared_ptr<const Functions> functions, void* display, void* config, std::string name)
    : functions_(std::move(functions)), display_(display), config_(config), name_(std::move(name)) {}

absl::StatusOr<std::unique_ptr<EglDisplay>> EglDisplay::Open(bool software, int device) {
  ASSIGN_OR_RETURN(const std::shared_ptr<const Functions> functions, Functions::Load());
  int32_t count = 0;
  if (!functions->QueryDevices(0, nullptr, &count) || count < 1) return absl::UnavailableError("EGL knows no device");
  std::vector<void*> devices(static_cast<size_t>(count));
  if (!functions->QueryDevices(count, devices.data(), &count)) return absl::UnavailableError("EGL does not list its devices");
  if (device >= count) return absl::UnavailableError(absl::StrCat("EGL has no device ", device, ", expected 0 to ", count - 1));
  std::string why;
  for (int32_t i = 0; i < count; ++i) {
    if (device >= 0 && i != device) continue;
    if (!software && Has(functions->QueryDeviceString(devices[i], kExtensions), "EGL_MESA_device_software")) {
      absl::StrAppend(&why, "; device ", i, " draws in software");
      continue;
    }
    absl::StatusOr<std::unique_ptr<EglDisplay>> opened = OpenDevice(functions, devices[i], i);
    if (opened.ok()) return opened;
    absl::StrAppend(&why, "; ", opened.status().message());
  }
  return absl::UnavailableError(absl::StrCat("no EGL device can be used", why));
}

absl::StatusOr<std::unique_ptr<EglDisplay>> EglDisplay::OpenDevice(std::shared_ptr<const Functions> functions, void* device,
                                                                   int number) {
  const auto refuse = [&](absl::string_view what) {
    return absl::UnavailableError(absl::StrCat("device ", number, " ", what, " (error ", functions->GetError(), ")"));
  };
  void* const display = functions->GetPlatformDisplay(kPlatformDevice, device, nullptr);
  if (display == nullptr || !functions->Initialize(display, nullptr, nullptr)) return refuse("has no display");
  if (!Has(functions->QueryString(display, kExtensions), "EGL_KHR_surfaceless_context")) return refuse("needs a surface");
  if (!functions->BindAPI(kOpenGlApi)) return refuse("does not know OpenGL");
  void* config = nullptr;
  int32_t count = 0;
  if (!functions->ChooseConfig(display, kConfigAttributes, &config, 1, &count) || count < 1) {
    return refuse("has no fitting configuration");
  }
  const char* const vendor = functions->QueryString(display, kVendor);
  std::unique_ptr<EglDisplay> opened(new EglDisplay(
      functions, display, config, absl::StrCat("device ", number, ", ", vendor == nullptr ? "unknown vendor" : vendor)));
  // A driver that is there may still refuse: try it.
  ASSIGN_OR_RETURN(void* const context, opened->CreateContext());
  const bool current = opened->MakeCurrent(context);
  if (current) opened->MakeCurrent(nullptr);
  opened->DestroyContext(context);
  if (!current) return refuse("does not make its context current");
  return opened;
}

void EglDisplay::Publish() { dlopen(kLibrary, RTLD_NOW | RTLD_GLOBAL); }

absl::StatusOr<void*> EglDisplay::CreateContext() {
  functions_->BindAPI(kOpenGlApi);  // of this thread
  void* const context = functions_->CreateContext(display_, config_, nullptr, nullptr);
  if (context != nullptr) return context;
  return absl::InternalError(absl::StrCat("EGL made no OpenGL context (error ", functions_->GetError(), ")"));
}

void EglDisplay::DestroyContext(void* context) { functions_->DestroyContext(display_, context); }

bool EglDisplay::MakeCurrent(void* context) {
  functions_->BindAPI(kOpenGlApi);  // of this thread: says which context a release means
  return functions_->MakeCurrent(display_, nullptr, nullptr, context);
}

}  // namespace orrery
