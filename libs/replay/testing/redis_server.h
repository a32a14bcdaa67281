// A real redis-server for tests, on a free port of the loopback interface. The environment variable ORRERY_REDIS_SERVER names
// another program that takes its flags, as valkey-server does.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "libs/replay/testing/child_process.h"

namespace orrery {

// Not thread-safe, but for Ask(). The server ends with this object (and with the thread that started it, should the test die).
class RedisServer {
 public:
  // Starts redis-server with an append-only file in `folder`, synced before every answer, and waits until it answers.
  // `arguments` are added to the command line, for example {"--maxmemory", "8mb"}. NOT_FOUND: redis-server is not installed.
  static absl::StatusOr<std::unique_ptr<RedisServer>> Start(const std::string& folder, std::vector<std::string> arguments = {});

  int port() const { return port_; }
  // "redis://127.0.0.1:PORT".
  std::string url() const;
  // kill -9, and waits until it is gone.
  void Kill();
  // Starts it again on the same port and folder; call after Kill().
  absl::Status Restart();

  // Asks it as another program would, on a connection of its own, and gives the reply as text: arrays in brackets, a missing
  // value as "-", "no answer" when it is gone. Thread-safe.
  std::string Ask(const std::vector<std::string>& words, const std::string& password = "") const;

 private:
  RedisServer(std::string folder, std::vector<std::string> arguments, int port)
      : folder_(std::move(folder)), arguments_(std::move(arguments)), port_(port) {}
  absl::Status Launch();

  const std::string folder_;
  const std::vector<std::string> arguments_;
  const int port_;
  std::unique_ptr<ChildProcess> process_;
};

}  // namespace orrery
