// Several environments that step at the same time.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "libs/base/array.h"
#include "libs/base/clock.h"
#include "libs/envs/environment.h"
#include "libs/envs/tasks.h"

namespace orrery {

// What an environment answered to Reset or Step.
struct VectorResult {
  int index = 0;                  // of the environment
  absl::StatusOr<TimeStep> step;  // fits the specification; errors below
  absl::Duration duration;        // that the environment took
};

// Environments 0 to size - 1, each on a thread of its own: all calls on an environment, from making to destroying it, come
// from its thread. Not thread-safe but for Interrupt: one thread uses the object.
//
//   ASSIGN_OR_RETURN(auto all, VectorEnvironment::Create({.size = 8, .environment = {.task = "cartpole_swingup"}}));
//   for (int i = 0; i < all->size(); ++i) RETURN_IF_ERROR(all->Reset(i, seed + i));
//   while (…) {
//     for (VectorResult& result : all->Take(absl::Milliseconds(20))) … RETURN_IF_ERROR(all->Step(result.index, action));
//   }
//
// An environment that fails is destroyed, and its next Reset makes a new one. Failures are: an error or exception of its own
// (its status, INTERNAL for an exception), a step that does not fit the specification (CheckStep: INTERNAL), and a call that
// takes longer than `timeout` (DEADLINE_EXCEEDED). The thread of the latter is left alone, and ends itself if the call ever
// returns. The others go on. What an environment delivers depends on its own seed and actions only.
class VectorEnvironment {
 public:
  struct Options {
    int size = 1;                    // environments, 1 to 1024
    EnvironmentOptions environment;  // of each, unless Reset says otherwise
    // Called on several threads at once, and perhaps after this object's end by a thread that was left alone.
    EnvironmentMaker make = MakeEnvironment;
    absl::Duration timeout = absl::Seconds(60);  // of one call; the making of an environment is part of its Reset
    absl::Duration grace = absl::Seconds(10);    // that the destructor waits for running calls
    Clock* clock = &Clock::Real();               // lives as long as a thread that was left alone
  };

  // Makes all environments. INVALID_ARGUMENT for a size or time out of range; the error of the first one that cannot be made,
  // or FAILED_PRECONDITION if their specifications differ.
  static absl::StatusOr<std::unique_ptr<VectorEnvironment>> Create(Options options);
  // Waits for running calls, `grace` at most; threads that still run one are left alone.
  ~VectorEnvironment();
  VectorEnvironment(const VectorEnvironment&) = delete;
  VectorEnvironment& operator=(const VectorEnvironment&) = delete;

  int size() const;
  // Of every environment.
  const EnvironmentSpec& spec() const;

  // Begin a call and return at once; its result comes from Take. INVALID_ARGUMENT for an index out of range or an action of
  // the wrong size or not finite, FAILED_PRECONDITION while the environment is busy. None of these changes anything.
  absl::Status Reset(int index, uint64_t seed);
  // Plays another task, made on its first Reset and kept. One that does not have the specification of the others fails with
  // FAILED_PRECONDITION (in its result).
  absl::Status Reset(int index, const EnvironmentOptions& task, uint64_t seed);
  absl::Status Step(int index, absl::Span<const float> action);

  // Whether a call runs whose result was not taken.
  bool busy(int index) const;
  int busy() const;  // environments

  // Results, ordered by index, each once. Waits until there are `at_least` (or nothing is busy), then for those calls that
  // began less than `patience` ago: so quick environments come together, and one that takes longer holds nobody up. Returns
  // earlier, with what is there, when `deadline` has passed or at Interrupt.
  std::vector<VectorResult> Take(absl::Duration patience, int at_least = 1, absl::Time deadline = absl::InfiniteFuture());
  // Ends a running Take, else the next one. Thread-safe.
  void Interrupt();

  // A picture for people, as Environment::Render; waits for it. FAILED_PRECONDITION while the environment is busy or none is
  // there (before its first Reset after a failure), DEADLINE_EXCEEDED as a step. Any error but INVALID_ARGUMENT is a failure.
  absl::StatusOr<Array> Render(int index, int height, int width);

 private:
  struct Call;
  struct State;

  explicit VectorEnvironment(Options options);
  absl::Status MakeAll();
  absl::Status Begin(int index, Call call);

  const std::shared_ptr<State> state_;  // with the threads, also with those that are left alone
};

}  // namespace orrery
