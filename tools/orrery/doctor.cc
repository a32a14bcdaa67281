// orrery doctor: says what was found on this machine, and fails when something required is missing.
#include <netdb.h>
#include <sys/socket.h>
#include <torch/torch.h>
#include <torch/version.h>
#include <unistd.h>

#include <ATen/Version.h>

#include <cstdio>
#include <memory>
#include <string>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "libs/base/cpu.h"
#include "libs/base/file.h"
#include "libs/base/status.h"
#include "libs/envs/environment.h"
#include "libs/envs/gl_context.h"
#include "libs/envs/mujoco_version.h"
#include "tools/orrery/command.h"

namespace orrery {
namespace {

struct Flags {
  std::string redis;
};

void Report(bool ok, const std::string& what, const std::string& found) {
  std::printf("%-4s %-10s %s\n", ok ? "ok" : "FAIL", what.c_str(), found.c_str());
}

bool HasCpuFlag(const std::string& flag) {
  const absl::StatusOr<std::string> info = ReadFile("/proc/cpuinfo");
  return info.ok() && absl::StrContains(*info, absl::StrCat(" ", flag));
}

bool CheckTorch() {
  const absl::StatusOr<double> sum = CatchExceptions("a matrix product", []() -> absl::StatusOr<double> {
    return torch::ones({8, 8}).matmul(torch::ones({8, 8})).sum().item<double>();
  });
  const bool ok = sum.ok() && *sum == 512;
  std::string found = absl::StrFormat(
      "%s, CPU capability %s, oneDNN %s, bfloat16 %s", TORCH_VERSION, at::get_cpu_capability(),
      at::hasMKLDNN() ? "yes" : "no",
      HasCpuFlag("amx_bf16") ? "AMX" : (HasCpuFlag("avx512_bf16") ? "AVX-512" : "emulated"));
  if (!ok) absl::StrAppend(&found, "; a matrix product failed: ", std::string(sum.status().message()));
  Report(ok, "LibTorch", found);
  return ok;
}

void ReportProcessors() {
  Report(true, "Processors", absl::StrFormat("%d available to this process", AvailableCpus()));
  const absl::StatusOr<int> devices = CatchExceptions("CUDA", []() -> absl::StatusOr<int> {
    return torch::cuda::is_available() ? static_cast<int>(torch::cuda::device_count()) : 0;
  });
  Report(true, "GPUs", !devices.ok() ? std::string(devices.status().message())
                       : *devices > 0 ? absl::StrFormat("%d", *devices)
                                      : "none usable by this build (not required)");
}

// A task simulates and renders: the library, its description and OpenGL are there.
bool CheckTask(const std::string& what, const std::string& version, const std::string& task) {
  const auto play = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(std::unique_ptr<Environment> environment, MakeEnvironment({.task = task, .image_size = 32}));
    ASSIGN_OR_RETURN(TimeStep first, environment->Reset(1));
    ASSIGN_OR_RETURN(const Array picture, environment->Render(64, 64));
    const auto pixels = picture.as<uint8_t>();
    for (uint8_t pixel : pixels) {
      if (pixel != pixels[0]) return absl::OkStatus();
    }
    return absl::InternalError(absl::StrCat("the picture is of one colour, drawn by ", GlContext::Description()));
  };
  const absl::Status status = CatchExceptions(task, play);
  Report(status.ok(), what,
         absl::StrCat(version, status.ok() ? absl::StrCat(task, " simulates and renders") : std::string(status.message())));
  return status.ok();
}

// Speaks just enough of the protocol for a PING.
absl::Status PingRedis(const std::string& address) {
  const std::vector<std::string> parts = absl::StrSplit(address, absl::MaxSplits(':', 1));
  if (parts.size() != 2) return absl::InvalidArgumentError(absl::StrCat("--redis=", address, ": expected HOST:PORT"));
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(parts[0].c_str(), parts[1].c_str(), &hints, &found); error != 0) {
    return absl::UnavailableError(absl::StrCat("Redis at ", address, ": ", gai_strerror(error)));
  }
  const absl::Cleanup free_addresses = [found] { freeaddrinfo(found); };
  const int fd = socket(found->ai_family, SOCK_STREAM, 0);
  const absl::Cleanup close_socket = [fd] { close(fd); };
  timeval timeout{3, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
  char answer[64];
  ssize_t length = -1;
  if (connect(fd, found->ai_addr, found->ai_addrlen) == 0 && send(fd, "PING\r\n", 6, MSG_NOSIGNAL) == 6) {
    length = recv(fd, answer, sizeof(answer), 0);
  }
  if (length <= 0) return absl::UnavailableError(absl::StrCat("Redis at ", address, ": cannot be reached"));
  const absl::string_view text(answer, static_cast<size_t>(length));
  // A server that wants a password is there, too.
  if (absl::StartsWith(text, "+PONG") || absl::StartsWith(text, "-NOAUTH")) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("Redis at ", address, ": answers, but not like Redis"));
}

absl::Status Run(const Flags& flags) {
  UnblockShutdownSignals();
  bool ok = CheckTorch();
  ReportProcessors();
  ok &= CheckTask("Built in", "", "point_pixels");
  ok &= CheckTask("MuJoCo", MujocoVersion() + ", ", "cartpole_balance");
  Report(true, "OpenGL", GlContext::Description());
  if (!flags.redis.empty()) {
    const absl::Status redis = PingRedis(flags.redis);
    Report(redis.ok(), "Redis", redis.ok() ? absl::StrCat("answers at ", flags.redis) : std::string(redis.message()));
    ok &= redis.ok();
  }
  return ok ? absl::OkStatus() : absl::FailedPreconditionError("something required is missing, see above");
}

}  // namespace

void AddDoctorCommand(CLI::App& app, Command& command) {
  CLI::App* doctor = app.add_subcommand("doctor", "Says what was found: LibTorch, processors, GPUs, MuJoCo, OpenGL, Redis");
  auto flags = std::make_shared<Flags>();
  doctor->add_option("--redis", flags->redis, "HOST:PORT of a Redis that must be reachable (default: not looked for)");
  doctor->callback([&command, flags] { command = [flags] { return Run(*flags); }; });
}

}  // namespace orrery
