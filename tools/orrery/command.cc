#include "tools/orrery/command.h"

#include <pthread.h>
#include <torch/torch.h>

#include <csignal>

#include "libs/base/cpu.h"

namespace orrery {

void AddThreadsFlag(CLI::App& command, int& threads, const std::string& what) {
  command.add_option("--threads", threads, what + "; 0: as many as there are processors available")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
}

void SetTorchThreads(int threads) {
  at::set_num_threads(ThreadsOf(threads));
  at::set_num_interop_threads(1);
}

void UnblockShutdownSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
}

}  // namespace orrery
