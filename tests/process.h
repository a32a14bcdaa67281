// Child processes for tests that need several: started with a log file, ended with their test.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace orrery {

// One child process. Not thread-safe. Its destructor kills it (SIGKILL) if it still runs, and nothing else.
class Process {
 public:
  // Starts argv[0] with standard output and error appended to `log`. Fails the test when it cannot be started.
  Process(std::vector<std::string> argv, std::string log);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void Signal(int signal_number);
  // Waits for the end. Exit status, 128 + signal number for a signalled one, or -1 when it still runs at the deadline.
  int Wait(absl::Duration timeout);
  void Kill();  // SIGKILL, then waits
  bool Running();
  pid_t pid() const { return pid_; }
  // What it printed so far.
  std::string Log() const;

 private:
  const std::string log_;
  pid_t pid_ = -1;
  int status_ = -1;  // of waitpid, once it ended
};

// Body of http://127.0.0.1:PORT/PATH, or empty when there is no answer.
std::string HttpGet(int port, const std::string& path);

// Value of the first sample whose name and labels begin with `name` in a Prometheus exposition; -1 when there is none.
double MetricValue(const std::string& exposition, const std::string& name);

}  // namespace orrery
