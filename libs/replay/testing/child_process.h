// Other programs for tests.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace orrery {

// A program that runs beside the test. Not thread-safe. It ends with this object (and with the thread that started it, should
// the test die).
class ChildProcess {
 public:
  // Starts a program that is found by PATH; what it says is added to the file `log`.
  static absl::StatusOr<std::unique_ptr<ChildProcess>> Start(std::vector<std::string> words, const std::string& log);
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  // Whether it has ended by itself; if so, OK for exit code 0, NOT_FOUND when the program is not installed, or else UNAVAILABLE
  // with the exit code. ABORTED after Kill().
  bool Ended(absl::Status& status);
  // Until it has ended by itself, as Ended(); DEADLINE_EXCEEDED when it goes on.
  absl::Status Await(absl::Duration limit);
  // kill -9, and waits until it is gone.
  void Kill();

 private:
  ChildProcess(std::string name, std::string log, pid_t pid) : name_(std::move(name)), log_(std::move(log)), pid_(pid) {}

  const std::string name_;
  const std::string log_;
  pid_t pid_;  // 0: it has ended
  absl::Status end_;
};

// Runs a program to its end.
absl::Status RunProcess(std::vector<std::string> words, const std::string& log, absl::Duration limit = absl::Seconds(30));

// A TCP port of the loopback interface that nobody has now. Someone else may take it before it is used.
absl::StatusOr<int> FreePort();

}  // namespace orrery
