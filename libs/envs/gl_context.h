// Off-screen OpenGL, on a GPU or in software.
#pragma once

#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace orrery {

// A context of EGL or OSMesa. Which of them is decided once for the process, since MuJoCo loads OpenGL's functions once, by the
// environment variable MUJOCO_GL as dm_control reads it:
//   egl      the first EGL device, or the one of MUJOCO_EGL_DEVICE_ID; OSMesa, with a warning, where none can be used
//   osmesa   OSMesa
//   unset    EGL if there is a device that is no software, else OSMesa
// Any thread may use a context; calls on all contexts of the process run one at a time. INTERNAL when OpenGL refuses or `f`
// throws.
class GlContext {
 public:
  static absl::StatusOr<std::unique_ptr<GlContext>> Create();
  virtual ~GlContext() = default;
  GlContext(const GlContext&) = delete;
  GlContext& operator=(const GlContext&) = delete;

  // What contexts of this process are and why, for people: "OSMesa (no EGL device can be used; …)".
  static const std::string& Description();

  // Runs `f` with the context current in this thread, and releases it.
  absl::Status Run(absl::FunctionRef<absl::Status()> f);

 protected:
  GlContext() = default;

 private:
  virtual bool MakeCurrent() = 0;
  virtual void Release() = 0;
};

}  // namespace orrery
