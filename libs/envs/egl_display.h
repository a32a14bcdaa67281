// OpenGL without a screen, by EGL's devices. The library is loaded when it is asked for: a machine without it needs none.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace orrery {

// A device's display. Never closed: its library stays in the process. Not thread-safe; several threads may make contexts of
// their own current.
class EglDisplay {
 public:
  // The first device that draws OpenGL without a surface, or number `device` alone if that is not negative. Devices that draw
  // in software are taken only if `software` is true. UNAVAILABLE says what is missing: the library, a device, or what the
  // device cannot do.
  static absl::StatusOr<std::unique_ptr<EglDisplay>> Open(bool software, int device = -1);
  EglDisplay(const EglDisplay&) = delete;
  EglDisplay& operator=(const EglDisplay&) = delete;

  // For people: "device 0, NVIDIA".
  const std::string& name() const { return name_; }
  // Makes the library's functions those that MuJoCo finds: it looks for eglGetProcAddress among the process' global symbols.
  void Publish();

  // INTERNAL when EGL refuses.
  absl::StatusOr<void*> CreateContext();
  void DestroyContext(void* context);
  // In this thread; nullptr releases what is current. False when EGL refuses.
  bool MakeCurrent(void* context);

 private:
  struct Functions;

  EglDisplay(std::shared_ptr<const Functions> functions, void* display, void* config, std::string name);
  static absl::StatusOr<std::unique_ptr<EglDisplay>> OpenDevice(std::shared_ptr<const Functions> functions, void* device,
                                                                int number);

  const std::shared_ptr<const Functions> functions_;
  void* const display_;
  void* const config_;
  const std::string name_;
};

}  // namespace orrery
