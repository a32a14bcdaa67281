// Threads that share what is computed on a CPU: the slices of a batch, the candidates of a plan, the requests of a batch.
//
// LibTorch's own threads split single operations, which costs more than it saves where operations take microseconds; whole
// slices of the network keep each thread busy and its activations in its cache.
#pragma once

#include <c10/core/thread_pool.h>
#include <torch/torch.h>

#include <functional>
#include <vector>

namespace orrery {

// Lets the calling thread compute with as many threads of LibTorch's own as at::set_num_threads has set; to be called by every
// thread that computes. Else OpenMP gives a new thread as many helpers as there are processors, and those take them from
// whoever computes: they spin while they wait for more.
void UseTorchThreads();

// Threads that help the caller. Thread-safe.
class RowWorkers {
 public:
  // `threads` counts the caller; at least 1.
  explicit RowWorkers(int threads);
  int threads() const { return helpers_ + 1; }
  // Calls task(0) … task(tasks - 1), each once, on the workers and the calling thread; rethrows the first exception. Called
  // from within a task it does all on the calling thread, since the others are busy.
  void Run(int64_t tasks, const std::function<void(int64_t)>& task);
  // The same for tasks that can themselves be shared: side by side while there are enough for all threads, and those that are
  // left one after another, each with all the workers at its service.
  void RunWhole(int64_t tasks, const std::function<void(int64_t)>& task);

 private:
  const int helpers_;
  c10::ThreadPool pool_;
};

// f(x) where row i of the result [N, …] depends on row i of x [N, …] and on `parameters` alone; with the gradient for both.
// The slices, and so the result to the last bit, do not depend on the number of threads. `workers` must outlive the graph.
torch::Tensor ParallelRows(RowWorkers& workers, const std::function<torch::Tensor(const torch::Tensor&)>& f,
                           const torch::Tensor& x, const std::vector<torch::Tensor>& parameters);

}  // namespace orrery
