#include "libs/envs/vector_environment.h"

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "libs/base/status.h"
#include "libs/envs/check_step.h"
#include "libs/envs/simulator.h"

namespace orrery {
namespace {

constexpr int kMostEnvironments = 1024;

struct Answer {
  absl::Status status;
  TimeStep step;                  // of Reset and Step
  Array picture;                  // of Render
  EnvironmentSpec specification;  // of a make
  absl::Duration duration;
};

// CatchExceptions, and whatever else is thrown.
template <typename F>
absl::Status CatchAnything(F&& f) {
  try {
    return CatchExceptions("the environment", f);
  } catch (...) {
    return absl::InternalError("the environment threw something that is no std::exception");
  }
}

// The environments of one thread.
class Tasks {
 public:
  Tasks(const EnvironmentMaker& make, const EnvironmentSpec& spec) : make_(make), spec_(spec) {}

  // Makes the task's environment the present one; returns its specification.
  absl::StatusOr<EnvironmentSpec> Choose(const EnvironmentOptions& task) {
    present_ = nullptr;
    name_ = task.task;
    std::unique_ptr<Environment>& environment = environments_[task.task];
    if (environment == nullptr) {
      ASSIGN_OR_RETURN(environment, make_(task));
    }
    present_ = environment.get();
    return environment->spec();
  }

  absl::Status Reset(const EnvironmentOptions& task, uint64_t seed, TimeStep& first) {
    ASSIGN_OR_RETURN(const EnvironmentSpec spec, Choose(task));
    if (!(spec == spec_)) {
      return absl::FailedPreconditionError(
          absl::StrCat("task \"", task.task, "\" has other observations or actions than the others"));
    }
    ASSIGN_OR_RETURN(first, present_->Reset(seed));
    return CheckStep(spec_, first);
  }

  absl::Status Step(absl::Span<const float> action, TimeStep& next) {
    RETURN_IF_ERROR(CheckPresent());
    ASSIGN_OR_RETURN(next, present_->Step(action));
    return CheckStep(spec_, next);
  }

  absl::Status Render(int height, int width, Array& picture) {
    RETURN_IF_ERROR(CheckPresent());
    ASSIGN_OR_RETURN(picture, present_->Render(height, width));
    return absl::OkStatus();
  }

  void DropPresent() {
    environments_.erase(name_);
    present_ = nullptr;
  }

 private:
  absl::Status CheckPresent() const {
    if (present_ != nullptr) return absl::OkStatus();
    return absl::FailedPreconditionError("no episode is running: call Reset first");
  }

  const EnvironmentMaker& make_;
  const EnvironmentSpec& spec_;
  std::map<std::string, std::unique_ptr<Environment>> environments_;  // by task
  std::string name_;                                                  // of the present one
  Environment* present_ = nullptr;
};

}  // namespace

struct VectorEnvironment::Call {
  enum class Kind { kMake, kReset, kStep, kRender };
  Kind kind = Kind::kMake;
  EnvironmentOptions task;    // kMake, kReset
  uint64_t seed = 0;          // kReset
  std::vector<float> action;  // kStep
  int height = 0, width = 0;  // kRender
};

struct VectorEnvironment::State {
  struct Slot {
    std::thread thread;            // serves it
    int thread_number = 0;         // of `thread`; those with other numbers were left alone
    bool serving = false;          // `thread` has not ended
    bool busy = false;             // a call was begun and its answer not taken
    std::optional<Call> call;      // not yet noticed by the thread
    std::optional<Answer> answer;  // not yet taken
    absl::Time begin;    // of the call
    std::string task;    // played last
    absl::CondVar wake;  // there is a call, or the thread is no longer wanted
    bool running() const { return busy && !answer.has_value(); }
  };

  explicit State(Options options_in) : options(std::move(options_in)), slots(options.size) {}

  // Of a slot's thread: serves calls until the thread is no longer wanted.
  static void Serve(const std::shared_ptr<State>& state, int index, int thread_number);
  bool ServeOne(int index, int thread_number, Tasks& tasks);
  Answer Execute(const Call& call, Tasks& tasks) const;

  // Gives the slot a thread if it has none.
  static absl::Status StartThread(const std::shared_ptr<State>& state, int index);
  // Makes the slot's thread one that was left alone.
  void LeaveAlone(Slot& slot) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu);
  // Gives up calls that take too long.
  void EndHanging() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu);
  // When the next call takes too long.
  absl::Time NextTimeout() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu);
  // Of a slot that has one; the slot is free then.
  static Answer TakeAnswer(Slot& slot);
  // Waits for the slot's, and takes it.
  Answer AwaitAnswer(Slot& slot) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu);
  std::vector<VectorResult> TakeAnswers() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu);

  const Options options;
  EnvironmentSpec spec;  // constant from Create on
  absl::Mutex mu;
  absl::CondVar changed;  // there is an answer, a thread has ended, or Interrupt
  bool interrupted ABSL_GUARDED_BY(mu) = false;
  bool closing ABSL_GUARDED_BY(mu) = false;
  std::vector<Slot> slots ABSL_GUARDED_BY(mu);
};

void VectorEnvironment::State::Serve(const std::shared_ptr<State>& state, int index, int thread_number) {
  {
    Tasks tasks(state->options.make, state->spec);
    while (state->ServeOne(index, thread_number, tasks)) {
    }
  }
  absl::MutexLock lock(&state->mu);
  if (Slot& slot = state->slots[index]; slot.thread_number == thread_number) slot.serving = false;
  state->changed.SignalAll();
}

bool VectorEnvironment::State::ServeOne(int index, int thread_number, Tasks& tasks) {
  Call call;
  {
    absl::MutexLock lock(&mu);
    Slot& slot = slots[index];
    while (slot.thread_number == thread_number && !closing && !slot.call.has_value()) slot.wake.Wait(&mu);
    if (slot.thread_number != thread_number || closing) return false;
    call = *std::move(slot.call);
    slot.call.reset();
  }
  Answer answer = Execute(call, tasks);
  absl::MutexLock lock(&mu);
  Slot& slot = slots[index];
  if (slot.thread_number != thread_number) return false;
  slot.answer = std::move(answer);
  changed.SignalAll();
  return true;
}

Answer VectorEnvironment::State::Execute(const Call& call, Tasks& tasks) const {
  Answer answer;
  const absl::Time begin = options.clock->Now();
  answer.status = CatchAnything([&]() -> absl::Status {
    switch (call.kind) {
      case Call::Kind::kMake: {
        ASSIGN_OR_RETURN(answer.specification, tasks.Choose(call.task));
        return absl::OkStatus();
      }
      case Call::Kind::kReset:
        return tasks.Reset(call.task, call.seed, answer.step);
      case Call::Kind::kStep:
        return tasks.Step(call.action, answer.step);
      case Call::Kind::kRender:
        return tasks.Render(call.height, call.width, answer.picture);
    }
    return absl::InternalError("unknown call");
  });
  answer.duration = options.clock->Now() - begin;
  const bool harmless = call.kind == Call::Kind::kRender && absl::IsInvalidArgument(answer.status);
  if (!answer.status.ok() && !harmless) tasks.DropPresent();
  return answer;
}

absl::Status VectorEnvironment::State::StartThread(const std::shared_ptr<State>& state, int index) {
  absl::MutexLock lock(&state->mu);
  Slot& slot = state->slots[index];
  if (slot.serving) return absl::OkStatus();
  try {
    slot.thread = std::thread(Serve, state, index, slot.thread_number);
  } catch (const std::system_error& error) {
    return absl::ResourceExhaustedError(absl::StrCat("environment ", index, " gets no thread: ", error.what()));
  }
  slot.serving = true;
  return absl::OkStatus();
}

void VectorEnvironment::State::LeaveAlone(Slot& slot) {
  slot.thread_number += 1;
  slot.serving = false;
  slot.thread.detach();
}

void VectorEnvironment::State::EndHanging() {
  const absl::Time now = options.clock->Now();
  for (size_t i = 0; i < slots.size(); ++i) {
    Slot& slot = slots[i];
    if (!slot.running() || now < slot.begin + options.timeout) continue;
    LeaveAlone(slot);
    slot.call.reset();
    slot.answer.emplace();
    const std::string limit = absl::FormatDuration(options.timeout);
    slot.answer->status = absl::DeadlineExceededError(
        absl::StrCat("environment ", i, " (task \"", slot.task, "\") did not return within ", limit));
    slot.answer->duration = now - slot.begin;
  }
}

absl::Time VectorEnvironment::State::NextTimeout() const {
  absl::Time next = absl::InfiniteFuture();
  for (const Slot& slot : slots) {
    if (slot.running()) next = std::min(next, slot.begin + options.timeout);
  }
  return next;
}

Answer VectorEnvironment::State::TakeAnswer(Slot& slot) {
  Answer answer = *std::move(slot.answer);
  slot.answer.reset();
  slot.busy = false;
  return answer;
}

Answer VectorEnvironment::State::AwaitAnswer(Slot& slot) {
  for (EndHanging(); !slot.answer.has_value(); EndHanging()) options.clock->WaitUntil(changed, mu, NextTimeout());
  return TakeAnswer(slot);
}

std::vector<VectorResult> VectorEnvironment::State::TakeAnswers() {
  std::vector<VectorResult> results;
  for (size_t i = 0; i < slots.size(); ++i) {
    if (!slots[i].answer.has_value()) continue;
    Answer answer = TakeAnswer(slots[i]);
    using Step = absl::StatusOr<TimeStep>;
    Step step = answer.status.ok() ? Step(std::move(answer.step)) : Step(answer.status);
    results.push_back({static_cast<int>(i), std::move(step), answer.duration});
  }
  return results;
}

VectorEnvironment::VectorEnvironment(Options options)
    : state_(std::make_shared<State>(std::move(options))) {}

absl::StatusOr<std::unique_ptr<VectorEnvironment>> VectorEnvironment::Create(Options options) {
  if (options.size < 1 || options.size > kMostEnvironments) {
    return absl::InvalidArgumentError(absl::StrCat("size is ", options.size, ", expected 1 to ", kMostEnvironments));
  }
  if (options.timeout <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        absl::StrCat("timeout is ", absl::FormatDuration(options.timeout), ", expected more than 0"));
  }
  std::unique_ptr<VectorEnvironment> made(new VectorEnvironment(std::move(options)));
  RETURN_IF_ERROR(made->MakeAll());
  return made;
}

absl::Status VectorEnvironment::MakeAll() {
  Call make;
  make.task = state_->options.environment;
  for (int i = 0; i < size(); ++i) RETURN_IF_ERROR(Begin(i, make));
  absl::MutexLock lock(&state_->mu);
  std::vector<Answer> answers;
  for (State::Slot& slot : state_->slots) answers.push_back(state_->AwaitAnswer(slot));
  for (const Answer& answer : answers) RETURN_IF_ERROR(answer.status);
  state_->spec = answers[0].specification;
  for (const Answer& answer : answers) {
    if (!(answer.specification == state_->spec)) {
      return absl::FailedPreconditionError(
          absl::StrCat("environments of \"", state_->options.environment.task, "\" differ in their observations or actions"));
    }
  }
  return absl::OkStatus();
}

VectorEnvironment::~VectorEnvironment() {
  std::vector<std::thread> ended;
  {
    absl::MutexLock lock(&state_->mu);
    state_->closing = true;
    for (State::Slot& slot : state_->slots) slot.wake.SignalAll();
    Clock& clock = *state_->options.clock;
    const absl::Time deadline = clock.Now() + state_->options.grace;
    const auto serving = [](const State::Slot& slot) { return slot.serving; };
    while (std::any_of(state_->slots.begin(), state_->slots.end(), serving) && clock.Now() < deadline) {
      clock.WaitUntil(state_->changed, state_->mu, deadline);
    }
    for (State::Slot& slot : state_->slots) {
      if (slot.serving) state_->LeaveAlone(slot);
      if (slot.thread.joinable()) ended.push_back(std::move(slot.thread));
    }
  }
  for (std::thread& thread : ended) thread.join();  // they have no more than their last line to go
}

int VectorEnvironment::size() const { return state_->options.size; }

const EnvironmentSpec& VectorEnvironment::spec() const { return state_->spec; }

absl::Status VectorEnvironment::Reset(int index, uint64_t seed) { return Reset(index, state_->options.environment, seed); }

absl::Status VectorEnvironment::Reset(int index, const EnvironmentOptions& task, uint64_t seed) {
  Call call;
  call.kind = Call::Kind::kReset;
  call.task = task;
  call.seed = seed;
  return Begin(index, std::move(call));
}

absl::Status VectorEnvironment::Step(int index, absl::Span<const float> action) {
  const std::vector<double> numbers(action.begin(), action.end());
  RETURN_IF_ERROR(CheckNumbers(numbers, static_cast<size_t>(spec().action.size), "action"));
  Call call;
  call.kind = Call::Kind::kStep;
  call.action.assign(action.begin(), action.end());
  return Begin(index, std::move(call));
}

absl::Status VectorEnvironment::Begin(int index, Call call) {
  if (index < 0 || index >= size()) {
    return absl::InvalidArgumentError(absl::StrCat("environment ", index, ", expected 0 to ", size() - 1));
  }
  if (busy(index)) return absl::FailedPreconditionError(absl::StrCat("environment ", index, " is busy"));
  RETURN_IF_ERROR(State::StartThread(state_, index));
  absl::MutexLock lock(&state_->mu);
  State::Slot& slot = state_->slots[index];
  if (call.kind == Call::Kind::kMake || call.kind == Call::Kind::kReset) slot.task = call.task.task;
  slot.busy = true;
  slot.begin = state_->options.clock->Now();
  slot.call = std::move(call);
  slot.wake.Signal();
  return absl::OkStatus();
}

bool VectorEnvironment::busy(int index) const {
  absl::MutexLock lock(&state_->mu);
  return state_->slots[index].busy;
}

int VectorEnvironment::busy() const {
  absl::MutexLock lock(&state_->mu);
  return static_cast<int>(
      std::count_if(state_->slots.begin(), state_->slots.end(), [](const State::Slot& slot) { return slot.busy; }));
}

std::vector<VectorResult> VectorEnvironment::Take(absl::Duration patience, int at_least, absl::Time deadline) {
  absl::MutexLock lock(&state_->mu);
  Clock& clock = *state_->options.clock;
  for (;;) {
    state_->EndHanging();
    const absl::Time now = clock.Now();
    int running = 0, answers = 0;
    absl::Time patient_until = absl::InfinitePast();
    for (const State::Slot& slot : state_->slots) {
      answers += slot.answer.has_value();
      running += slot.running();
      if (slot.running()) patient_until = std::max(patient_until, slot.begin + patience);
    }
    const bool enough = answers >= at_least;
    if (running == 0 || (enough && now >= patient_until) || state_->interrupted || now >= deadline) break;
    const absl::Time until = std::min(deadline, state_->NextTimeout());
    clock.WaitUntil(state_->changed, state_->mu, enough ? std::min(until, patient_until) : until);
  }
  state_->interrupted = false;
  return state_->TakeAnswers();
}

void VectorEnvironment::Interrupt() {
  absl::MutexLock lock(&state_->mu);
  state_->interrupted = true;
  state_->changed.SignalAll();
}

absl::StatusOr<Array> VectorEnvironment::Render(int index, int height, int width) {
  Call call;
  call.kind = Call::Kind::kRender;
  call.height = height;
  call.width = width;
  RETURN_IF_ERROR(Begin(index, std::move(call)));
  absl::MutexLock lock(&state_->mu);
  Answer answer = state_->AwaitAnswer(state_->slots[index]);
  if (!answer.status.ok()) return answer.status;
  return std::move(answer.picture);
}

}  // namespace orrery
