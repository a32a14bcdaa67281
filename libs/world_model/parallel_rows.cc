#include "libs/world_model/parallel_rows.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"

namespace orrery {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using RowFunction = std::function<Tensor(const Tensor&)>;

// Enough work to pay for the hand-over, few enough gradients to add up.
constexpr int64_t kMinRowsPerSlice = 16;
constexpr int64_t kMaxSlices = 8;

// Taken for a moment by whoever hands tasks over and by each thread that takes them, so that the thread sanitizer, which does not
// see the mutex of c10's queue, sees what is handed over, too.
ABSL_CONST_INIT absl::Mutex handover(absl::kConstInit);

// One slice with a graph of its own, which the backward pass goes through on whichever thread it runs.
struct Slice {
  Tensor x, y;
};

// What the backward pass needs; kept alive by the node of the graph.
struct Slices : torch::CustomClassHolder {
  RowWorkers* workers = nullptr;
  std::vector<Slice> slices;
};

class ParallelRowsFunction : public torch::autograd::Function<ParallelRowsFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, at::ArrayRef<Tensor> parameters,
                        RowWorkers* workers, const RowFunction* f);
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients);
};

Tensor ParallelRowsFunction::forward(AutogradContext* ctx, const Tensor& x, at::ArrayRef<Tensor> parameters,
                                     RowWorkers* workers, const RowFunction* f) {
  const int64_t count = std::clamp<int64_t>(x.size(0) / kMinRowsPerSlice, 1, kMaxSlices);
  auto state = c10::make_intrusive<Slices>();
  state->workers = workers;
  const std::vector<Tensor> rows = x.detach().tensor_split(count);
  state->slices.resize(count);
  workers->Run(count, [&](int64_t i) {
    const at::AutoGradMode enable(true);
    Slice& slice = state->slices[i];
    slice.x = rows[i].detach().set_requires_grad(x.requires_grad());
    slice.y = (*f)(slice.x);
  });
  std::vector<Tensor> results;
  for (const Slice& slice : state->slices) results.push_back(slice.y.detach());
  ctx->save_for_backward(parameters.vec());
  ctx->saved_data["slices"] = c10::IValue::make_capsule(std::move(state));
  return at::cat(results);
}

variable_list ParallelRowsFunction::backward(AutogradContext* ctx, const variable_list& gradients) {
  const variable_list parameters = ctx->get_saved_variables();
  const auto state = c10::static_intrusive_pointer_cast<Slices>(ctx->saved_data["slices"].toCapsule());
  const bool needs_x = state->slices[0].x.requires_grad();
  const int64_t count = static_cast<int64_t>(state->slices.size());
  const std::vector<Tensor> rows = gradients[0].tensor_split(count);
  std::vector<variable_list> parts(count);
  state->workers->Run(count, [&](int64_t i) {
    Slice slice = std::move(state->slices[i]);  // its graph goes when it has been used
    variable_list inputs = parameters;
    if (needs_x) inputs.push_back(slice.x);
    parts[i] = torch::autograd::grad({slice.y}, inputs, {rows[i]});
  });
  variable_list result(1 + parameters.size() + 2);  // x, parameters; workers and function have no gradient
  if (needs_x) {
    std::vector<Tensor> x_parts;
    for (variable_list& part : parts) x_parts.push_back(part.back());
    result[0] = at::cat(x_parts);
  }
  for (size_t p = 0; p < parameters.size(); ++p) {
    result[1 + p] = parts[0][p];
    for (int64_t i = 1; i < count; ++i) result[1 + p].add_(parts[i][p]);
  }
  return result;
}

}  // namespace

void UseTorchThreads() {
  thread_local const bool done = [] {
    at::init_num_threads();
    return true;
  }();
  (void)done;
}

RowWorkers::RowWorkers(int threads)
    : helpers_(threads - 1), pool_(std::max(1, threads - 1), /*numa_node_id=*/-1, UseTorchThreads) {}

void RowWorkers::Run(int64_t tasks, const std::function<void(int64_t)>& task) {
  thread_local bool in_task = false;
  if (in_task) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next = 0;
  absl::Mutex mu;
  std::exception_ptr error ABSL_GUARDED_BY(mu);
  const auto work = [&] {
    in_task = true;
    for (int64_t i; (i = next.fetch_add(1)) < tasks;) {
      try {
        task(i);
      } catch (...) {
        absl::MutexLock lock(&mu);
        if (!error) error = std::current_exception();
      }
    }
    in_task = false;
  };
  const int helpers = static_cast<int>(std::clamp<int64_t>(tasks - 1, 0, helpers_));
  absl::BlockingCounter running(helpers);
  { absl::MutexLock lock(&handover); }
  for (int i = 0; i < helpers; ++i) {
    pool_.run([&] {
      { absl::MutexLock lock(&handover); }
      work();
      running.DecrementCount();
    });
  }
  work();
  running.Wait();
  absl::MutexLock lock(&mu);
  if (error) std::rethrow_exception(error);
}

void RowWorkers::RunWhole(int64_t tasks, const std::function<void(int64_t)>& task) {
  const int64_t side_by_side = tasks / threads() * threads();
  Run(side_by_side, task);
  for (int64_t i = side_by_side; i < tasks; ++i) task(i);
}

Tensor ParallelRows(RowWorkers& workers, const RowFunction& f, const Tensor& x, const std::vector<Tensor>& parameters) {
  return ParallelRowsFunction::apply(x, at::ArrayRef<Tensor>(parameters), &workers, &f);
}

}  // namespace orrery
