#include "libs/replay/testing/child_process.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/status.h"

namespace orrery {
namespace {
constexpr int kNotInstalled = 127;
}  // namespace

absl::StatusOr<std::unique_ptr<ChildProcess>> ChildProcess::Start(std::vector<std::string> words, const std::string& log) {
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const pid_t pid = fork();
  if (pid < 0) return absl::ResourceExhaustedError(absl::StrCat("cannot fork: ", std::strerror(errno)));
  if (pid == 0) {
    // Only async-signal-safe calls from here on.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const int fd = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
    dup2(fd, STDOUT_FILENO);
    dup2(fd, STDERR_FILENO);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    execvp(argv[0], argv.data());
    _exit(kNotInstalled);
  }
  return std::unique_ptr<ChildProcess>(new ChildProcess(words[0], log, pid));
}

ChildProcess::~ChildProcess() { Kill(); }

bool ChildProcess::Ended(absl::Status& status) {
  int state = 0;
  if (pid_ != 0) {
    if (waitpid(pid_, &state, WNOHANG) != pid_) return false;
    pid_ = 0;
    const int code = WIFEXITED(state) ? WEXITSTATUS(state) : 128 + WTERMSIG(state);
    if (code == kNotInstalled) {
      end_ = absl::NotFoundError(absl::StrCat(name_, " is not installed (tools/setup.sh installs it)"));
    } else if (code != 0) {
      end_ = absl::UnavailableError(absl::StrCat(name_, " ended with exit code ", code, "; see ", log_));
    }
  }
  status = end_;
  return true;
}

absl::Status ChildProcess::Await(absl::Duration limit) {
  const absl::Time deadline = absl::Now() + limit;
  absl::Status status;
  while (!Ended(status)) {
    if (absl::Now() >= deadline) return absl::DeadlineExceededError(absl::StrCat(name_, " does not end; see ", log_));
    absl::SleepFor(absl::Milliseconds(10));  // another process: there is nothing to wait on
  }
  return status;
}

void ChildProcess::Kill() {
  if (pid_ == 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = 0;
  end_ = absl::AbortedError(absl::StrCat(name_, " was killed"));
}

absl::Status RunProcess(std::vector<std::string> words, const std::string& log, absl::Duration limit) {
  ASSIGN_OR_RETURN(const std::unique_ptr<ChildProcess> process, ChildProcess::Start(std::move(words), log));
  return process->Await(limit);
}

absl::StatusOr<int> FreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return absl::UnavailableError(absl::StrCat("cannot make a socket: ", std::strerror(errno)));
  absl::Cleanup closer = [fd] { close(fd); };
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    return absl::UnavailableError(absl::StrCat("cannot find a free port: ", std::strerror(errno)));
  }
  return ntohs(address.sin_port);
}

}  // namespace orrery
