#include "services/planner/planner_service_impl.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "libs/base/log.h"
#include "libs/base/random.h"
#include "libs/base/status.h"
#include "libs/client/status.h"
#include "libs/serving/batcher.h"
#include "libs/serving/engine.h"
#include "libs/tensors/tensors.h"
#include "orrery/planner/v1/planner.grpc.pb.h"

namespace orrery {
namespace {

using planner::v1::ActRequest;
using planner::v1::ActResponse;

constexpr size_t kMaxClientIdBytes = 128;
constexpr int kMaxSlots = 256;
constexpr int kCodes = 17;  // of google.rpc.Code

// Counts and times answers.
class ActMetrics {
 public:
  explicit ActMetrics(prometheus::Registry& registry)
      : act_seconds_(AddHistogram(registry, "planner_act_seconds", "Time from the arrival of a request to its answer.",
                                  SecondsBuckets())) {
    for (int code = 0; code < kCodes; ++code) {
      answers_[static_cast<size_t>(code)] =
          &AddCounter(registry, "planner_requests_total", "Answered Act requests.",
                      {{"code", absl::StatusCodeToString(static_cast<absl::StatusCode>(code))}});
    }
  }
  void Answered(absl::StatusCode code, absl::Duration took) {
    const int index = static_cast<int>(code);
    answers_[index >= 0 && index < kCodes ? static_cast<size_t>(index) : 2u]->Increment();  // 2: UNKNOWN
    act_seconds_.Observe(absl::ToDoubleSeconds(took));
  }

 private:
  prometheus::Histogram& act_seconds_;
  std::array<prometheus::Counter*, kCodes> answers_{};
};

// One Act call. Finishes its reactor exactly once; until then context and response are alive.
class ActCall final : public BatchRequest {
 public:
  ActCall(grpc::CallbackServerContext* context, ActResponse* response, ActMetrics* metrics, Clock* clock)
      : context_(context),
        reactor_(context->DefaultReactor()),
        response_(response),
        metrics_(metrics),
        clock_(clock),
        began_(clock->Now()) {}
  ~ActCall() override { Finish(absl::InternalError("the request was lost")); }

  bool cancelled() const override { return context_->IsCancelled(); }
  void Fail(const absl::Status& status) override { Finish(status); }
  void Succeed(const ServedModel& served, absl::Span<const SlotOutput> outputs) {
    for (const SlotOutput& output : outputs) {
      planner::v1::SlotResult& result = *response_->add_results();
      result.mutable_action()->Add(output.action.begin(), output.action.end());
      result.set_belief(output.belief);
      result.set_predicted_return(output.predicted_return);
    }
    response_->mutable_snapshot_version()->set_generation(served.version.generation);
    response_->mutable_snapshot_version()->set_counter(served.version.counter);
    Finish(absl::OkStatus());
  }
  grpc::ServerUnaryReactor* reactor() const { return reactor_; }

  std::vector<SlotInput> inputs;
  std::string model;                                // asked for; empty: any
  bool pinned = false;                              // planned with `checked_with`, whatever is newer by then
  std::shared_ptr<const ServedModel> checked_with;  // the model that `inputs` were found to fit

 private:
  void Finish(const absl::Status& status) {
    if (std::exchange(finished_, true)) return;
    metrics_->Answered(status.code(), clock_->Now() - began_);
    reactor_->Finish(ToGrpc(status));
  }

  grpc::CallbackServerContext* const context_;
  grpc::ServerUnaryReactor* const reactor_;
  ActResponse* const response_;
  ActMetrics* const metrics_;
  Clock* const clock_;
  const absl::Time began_;
  bool finished_ = false;
};

std::string SlotName(size_t i) { return absl::StrCat("slots[", i, "]"); }

absl::StatusOr<SlotInput> ParseSlot(const planner::v1::Slot& slot, const std::string& what) {
  SlotInput input;
  for (const common::v1::NamedTensor& observation : slot.observations()) {
    ASSIGN_OR_RETURN(Array array,
                     ToArray(observation.tensor(), absl::StrCat(what, ".observations \"", observation.name(), "\"")));
    if (!input.observations.emplace(observation.name(), std::move(array)).second) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ".observations: modality \"", observation.name(), "\" comes twice, expected once"));
    }
  }
  input.previous_action.assign(slot.previous_action().begin(), slot.previous_action().end());
  input.belief = slot.belief();
  input.exploration_noise = slot.exploration_noise();
  input.valid_actions.assign(slot.valid_actions().begin(), slot.valid_actions().end());
  return input;
}

absl::Status CheckRequest(const ActRequest& request) {
  if (request.client_id().empty() || request.client_id().size() > kMaxClientIdBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("client_id has ", request.client_id().size(), " characters, expected 1 to ", kMaxClientIdBytes));
  }
  if (request.slots().empty() || request.slots_size() > kMaxSlots) {
    return absl::InvalidArgumentError(
        absl::StrCat("request has ", request.slots_size(), " slots, expected 1 to ", kMaxSlots));
  }
  if (!planner::v1::Priority_IsValid(request.priority())) {
    return absl::InvalidArgumentError(absl::StrCat("priority ", static_cast<int>(request.priority()),
                                                   " is unknown, expected EXPLORATION or EVALUATION"));
  }
  return absl::OkStatus();
}

absl::Status CheckModelName(const ServedModel& served, const std::string& name) {
  if (name.empty() || name == served.name) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat("model \"", name, "\" is not served here, expected \"", served.name, "\""));
}

class PlannerServerImpl final : public PlannerServer, public planner::v1::PlannerService::CallbackService {
 public:
  PlannerServerImpl(const Options& options, torch::Device device)
      : clock_(options.clock),
        random_base_(DeriveSeed(std::random_device{}(), "planner")),
        metrics_(*options.registry),
        engine_(device, options.registry),
        holder_(MakeHolderOptions(options, device)),
        batcher_(MakeBatcherOptions(options), [this](Batcher::Batch batch) { RunBatch(std::move(batch)); }),
        worker_([this] {
          while (batcher_.Step()) {
          }
        }) {}
  ~PlannerServerImpl() override { Close(); }

  grpc::Service* service() override { return this; }
  SnapshotHolder& snapshots() override { return holder_; }
  void Close() override {
    batcher_.Close();
    absl::MutexLock lock(&close_mu_);
    if (worker_.joinable()) worker_.join();
  }

  grpc::ServerUnaryReactor* Act(grpc::CallbackServerContext* context, const ActRequest* request,
                                ActResponse* response) override {
    auto call = std::make_unique<ActCall>(context, response, &metrics_, clock_);
    grpc::ServerUnaryReactor* const reactor = call->reactor();
    const absl::Status status = CatchExceptions("Act", [&] { return Prepare(*context, *request, *call); });
    if (status.ok()) {
      batcher_.Enqueue(std::move(call));
    } else {
      call->Fail(status);
    }
    return reactor;
  }

  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context, const planner::v1::GetModelRequest* request,
                                     planner::v1::GetModelResponse* response) override {
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    reactor->Finish(ToGrpc(Describe(request->model(), *response)));
    return reactor;
  }

 private:
  SnapshotHolder::Options MakeHolderOptions(const Options& options, torch::Device device) {
    SnapshotHolder::Options holder;
    holder.workers = std::make_shared<RowWorkers>(options.threads);
    holder.bfloat16 = options.service.precision() == config::v1::PlannerService::BFLOAT16;
    holder.planner = options.planner;
    holder.default_name = options.run;
    holder.device = device;
    holder.registry = options.registry;
    holder.clock = options.clock;
    holder.warm_up = [this](const ServedModel& served) { return engine_.WarmUp(served); };
    holder.on_swap = options.on_swap;
    return holder;
  }
  static Batcher::Options MakeBatcherOptions(const Options& options) {
    Batcher::Options batcher;
    batcher.max_batch = options.service.max_batch();
    batcher.max_delay = absl::Microseconds(options.service.max_delay_micros());
    batcher.max_queue = options.service.max_queue();
    batcher.registry = options.registry;
    batcher.clock = options.clock;
    return batcher;
  }

  absl::StatusOr<std::shared_ptr<const ServedModel>> Served() const {
    std::shared_ptr<const ServedModel> served = holder_.Get();
    if (served == nullptr) return absl::UnavailableError("no snapshot yet: the planner waits for the learner's first one");
    return served;
  }

  absl::Status Describe(const std::string& name, planner::v1::GetModelResponse& response) const {
    ASSIGN_OR_RETURN(const std::shared_ptr<const ServedModel> served, Served());
    RETURN_IF_ERROR(CheckModelName(*served, name));
    response.set_model(served->name);
    response.mutable_snapshot_version()->set_generation(served->version.generation);
    response.mutable_snapshot_version()->set_counter(served->version.counter);
    response.set_model_config(ToText(served->model->config()));
    response.set_planner_config(ToText(served->info.planner));
    response.set_structure_hash(served->structure_hash);
    return absl::OkStatus();
  }

  // Checks everything that the client may have got wrong, so that in a batch nobody suffers from another's mistake.
  absl::Status Prepare(const grpc::CallbackServerContext& context, const ActRequest& request, ActCall& call) {
    RETURN_IF_ERROR(CheckRequest(request));
    ASSIGN_OR_RETURN(std::shared_ptr<const ServedModel> served, Served());
    if (request.has_snapshot_version()) {
      call.pinned = true;
      served = holder_.Get({request.snapshot_version().generation(), request.snapshot_version().counter()});
    }
    call.client_id = request.client_id();
    call.slots = request.slots_size();
    call.urgent = request.priority() == planner::v1::EVALUATION;
    call.deadline = absl::FromChrono(context.deadline());
    call.model = request.model();
    for (const planner::v1::Slot& slot : request.slots()) {
      ASSIGN_OR_RETURN(SlotInput input, ParseSlot(slot, SlotName(call.inputs.size())));
      input.seed = slot.has_seed() ? slot.seed() : DeriveSeed(random_base_, "slot", next_seed_++);
      call.inputs.push_back(std::move(input));
    }
    return Check(served, call);
  }

  static absl::Status Check(const std::shared_ptr<const ServedModel>& served, ActCall& call) {
    RETURN_IF_ERROR(CheckModelName(*served, call.model));
    for (size_t i = 0; i < call.inputs.size(); ++i) {
      RETURN_IF_ERROR(CheckSlot(*served, call.inputs[i], SlotName(i)));
    }
    call.checked_with = served;
    return absl::OkStatus();
  }

  // On the worker thread.
  void RunBatch(Batcher::Batch batch) {
    const std::shared_ptr<const ServedModel> newest = holder_.Get();
    std::map<SnapshotVersion, std::vector<ActCall*>> by_version;
    for (const auto& request : batch) {
      ActCall& call = static_cast<ActCall&>(*request);
      const bool checked = call.pinned || call.checked_with == newest;
      const absl::Status status = checked ? absl::OkStatus() : Check(newest, call);
      if (status.ok()) {
        by_version[call.checked_with->version].push_back(&call);
      } else {
        call.Fail(status);
      }
    }
    for (const auto& [version, calls] : by_version) RunCalls(*calls[0]->checked_with, calls);
  }

  void RunCalls(const ServedModel& served, absl::Span<ActCall* const> calls) {
    std::vector<const SlotInput*> slots;
    for (const ActCall* call : calls) {
      for (const SlotInput& input : call->inputs) slots.push_back(&input);
    }
    const absl::StatusOr<std::vector<absl::StatusOr<SlotOutput>>> outputs = engine_.Run(served, slots);
    if (!outputs.ok() && calls.size() > 1) {
      // One of them may be to blame: only that one shall fail.
      for (ActCall* const& call : calls) RunCalls(served, {&call, 1});
      return;
    }
    if (!outputs.ok()) {
      LogError("batch failed slots={} error=\"{}\"", slots.size(), outputs.status().ToString());
      calls[0]->Fail(outputs.status());
      return;
    }
    size_t first = 0;
    for (ActCall* call : calls) {
      Answer(served, *call, absl::MakeConstSpan(*outputs).subspan(first, call->inputs.size()));
      first += call->inputs.size();
    }
  }

  static void Answer(const ServedModel& served, ActCall& call, absl::Span<const absl::StatusOr<SlotOutput>> outputs) {
    std::vector<SlotOutput> results;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!outputs[i].ok()) {
        call.Fail(Annotate(outputs[i].status(), SlotName(i)));
        return;
      }
      results.push_back(*outputs[i]);
    }
    call.Succeed(served, results);
  }

  // Constant after construction.
  Clock* const clock_;
  const uint64_t random_base_;

  std::atomic<uint64_t> next_seed_ = 0;
  ActMetrics metrics_;
  InferenceEngine engine_;
  SnapshotHolder holder_;
  Batcher batcher_;
  absl::Mutex close_mu_;
  std::thread worker_;  // last: it uses all of the above
};

absl::Status CheckInRange(absl::string_view name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("planner_service.", name, " is ", value, ", expected ", low, " to ", high));
}

}  // namespace

absl::StatusOr<std::unique_ptr<PlannerServer>> PlannerServer::Create(Options options) {
  const config::v1::PlannerService& service = options.service;
  RETURN_IF_ERROR(CheckInRange("max_batch", service.max_batch(), 1, 1024));
  RETURN_IF_ERROR(CheckInRange("max_delay_micros", service.max_delay_micros(), 0, 1000000));
  RETURN_IF_ERROR(CheckInRange("max_queue", service.max_queue(), service.max_batch(), INT32_MAX));
  if (options.planner.has_value()) RETURN_IF_ERROR(Annotate(Validate(*options.planner), "planner"));
  ASSIGN_OR_RETURN(const torch::Device device, ParseDevice(options.device));
  return std::make_unique<PlannerServerImpl>(options, device);
}

}  // namespace orrery
