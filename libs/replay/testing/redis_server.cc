#include "libs/replay/testing/redis_server.h"

#include <fcntl.h>
#include <hiredis.h>
#include <netinet/in.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

constexpr char kProgram[] = "redis-server";
constexpr absl::Duration kStartLimit = absl::Seconds(20);
constexpr int kPortAttempts = 5;

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

// Whether it answers; with a password, that it asks for one is an answer too.
bool Answers(int port) {
  const std::unique_ptr<redisContext, void (*)(redisContext*)> context(
      redisConnectWithTimeout("127.0.0.1", port, absl::ToTimeval(absl::Seconds(1))), redisFree);
  if (context == nullptr || context->err != 0) return false;
  const std::unique_ptr<void, void (*)(void*)> reply(redisCommand(context.get(), "PING"), freeReplyObject);
  if (reply == nullptr) return false;
  const auto* r = static_cast<const redisReply*>(reply.get());
  return r->type == REDIS_REPLY_STATUS || std::strncmp(r->str, "NOAUTH", 6) == 0;
}

}  // namespace

absl::StatusOr<std::unique_ptr<RedisServer>> RedisServer::Start(const std::string& folder, std::vector<std::string> arguments) {
  absl::Status status;
  for (int attempt = 0; attempt < kPortAttempts; ++attempt) {
    // Someone else may take the port before redis-server does: then with another one.
    ASSIGN_OR_RETURN(const int port, FreePort());
    std::unique_ptr<RedisServer> server(new RedisServer(folder, arguments, port));
    status = server->Launch();
    if (status.ok()) return server;
    if (!absl::IsUnavailable(status)) return status;
  }
  return status;
}

RedisServer::~RedisServer() { Kill(); }

std::string RedisServer::url() const { return absl::StrCat("redis://127.0.0.1:", port_); }

absl::Status RedisServer::Restart() { return Launch(); }

void RedisServer::Kill() {
  if (pid_ == 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = 0;
}

absl::Status RedisServer::Launch() {
  std::vector<std::string> words = {kProgram, "--port", absl::StrCat(port_), "--bind", "127.0.0.1", "--dir", folder_,
                                    "--appendonly", "yes", "--appendfsync", "always", "--save", "", "--daemonize", "no"};
  words.insert(words.end(), arguments_.begin(), arguments_.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const std::string log = folder_ + "/redis.log";
  pid_ = fork();
  if (pid_ < 0) return absl::ResourceExhaustedError(absl::StrCat("cannot fork: ", std::strerror(errno)));
  if (pid_ == 0) {
    // Only async-signal-safe calls from here on.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const int fd = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
    dup2(fd, STDOUT_FILENO);
    dup2(fd, STDERR_FILENO);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    execvp(kProgram, argv.data());
    _exit(127);
  }
  const absl::Time deadline = absl::Now() + kStartLimit;
  while (absl::Now() < deadline) {
    int state = 0;
    if (waitpid(pid_, &state, WNOHANG) == pid_) {
      pid_ = 0;
      if (WIFEXITED(state) && WEXITSTATUS(state) == 127) {
        return absl::NotFoundError(absl::StrCat(kProgram, " is not installed (tools/setup.sh installs it)"));
      }
      return absl::UnavailableError(absl::StrCat(kProgram, " ended at once; see ", log));
    }
    if (Answers(port_)) return absl::OkStatus();
    absl::SleepFor(absl::Milliseconds(10));  // another process: there is nothing to wait on
  }
  Kill();
  return absl::DeadlineExceededError(absl::StrCat(kProgram, " does not answer on port ", port_, "; see ", log));
}

}  // namespace orrery
