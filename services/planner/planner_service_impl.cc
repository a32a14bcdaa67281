#include "services/planner/planner_service_impl.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "libs/base/log.h"
#include "libs/base/log_text.h"
#include "libs/base/random.h"
#include "libs/base/status.h"
#include "libs/base/trace.h"
#include "libs/client/chunk_proto.h"
#include "libs/client/status.h"
#include "libs/device/parse_device.h"
#include "libs/serving/batcher.h"
#include "libs/serving/engine.h"
#include "libs/telemetry/call_trace.h"
#include "libs/tensors/tensors.h"
#include "orrery/planner/v1/planner.grpc.pb.h"

namespace orrery {
namespace {

using planner::v1::ActRequest;
using planner::v1::ActResponse;

constexpr size_t kMaxClientIdBytes = 128;
constexpr int kMaxSlots = 256;
constexpr size_t kMaxModels = 64;
constexpr size_t kMaxModelNameBytes = 128;
constexpr int kCodes = 17;  // of google.rpc.Code

// Counts and times the answers of one model; `model` empty: those to requests that named none that is served.
class ActMetrics {
 public:
  ActMetrics(prometheus::Registry& registry, const std::string& model)
      : act_seconds_(AddHistogram(registry, "planner_act_seconds", "Time from the arrival of a request to its answer.",
                                  SecondsBuckets(), {{"model", model}})) {
    for (int code = 0; code < kCodes; ++code) {
      answers_[static_cast<size_t>(code)] =
          &AddCounter(registry, "planner_requests_total", "Answered Act requests.",
                      {{"code", absl::StatusCodeToString(static_cast<absl::StatusCode>(code))}, {"model", model}});
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

// One of the models that are served.
struct Model {
  Model(std::string given, SnapshotHolder::Options options, int64_t max_batch)
      : name(std::move(given)),
        metrics(*options.registry, options.labels.at("model")),
        together(!options.device.is_cpu()),
        engine(options.device, options.registry, options.labels),
        holder(WithWarmUp(std::move(options), max_batch)) {}

  absl::StatusOr<std::shared_ptr<const ServedModel>> Served() const {
    std::shared_ptr<const ServedModel> served = holder.Get();
    if (served == nullptr) return absl::UnavailableError("no snapshot yet: the planner waits for the learner's first one");
    return served;
  }

  const std::string name;  // that requests give; empty: what its snapshots say
  ActMetrics metrics;
  const bool together;  // whether it pays to compute requests together
  const InferenceEngine engine;
  SnapshotHolder holder;

 private:
  SnapshotHolder::Options WithWarmUp(SnapshotHolder::Options options, int64_t max_batch) const {
    options.name = name;
    options.warm_up = [this, warm_ups = InferenceEngine::WarmUpsOn(options.device, max_batch)](const ServedModel& served) {
      return engine.WarmUp(served, warm_ups);
    };
    options.warm_up_each = options.device.is_cuda();  // where plans are recorded for one snapshot at a time
    return options;
  }
};

// One Act call. Finishes its reactor exactly once; until then context and response are alive.
class ActCall final : public BatchRequest {
 public:
  // `unknown` counts the answer unless `model` is set.
  ActCall(grpc::CallbackServerContext* context, ActResponse* response, ActMetrics* unknown, Clock* clock)
      : context_(context),
        reactor_(context->DefaultReactor()),
        response_(response),
        unknown_(unknown),
        clock_(clock),
        began_(clock->Now()),
        trace_(TraceOf(*context)) {}
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
    *response_->mutable_snapshot_version() = ToProto(served.version);
    Finish(absl::OkStatus());
  }
  grpc::ServerUnaryReactor* reactor() const { return reactor_; }
  const TraceContext& trace() const { return trace_; }

  std::vector<SlotInput> inputs;
  Model* model = nullptr;
  std::string model_name;                           // asked for; empty: the only one
  bool pinned = false;                              // planned with `checked_with`, whatever is newer by then
  std::shared_ptr<const ServedModel> checked_with;  // the model that `inputs` were found to fit

 private:
  void Finish(const absl::Status& status) {
    if (std::exchange(finished_, true)) return;
    (model != nullptr ? model->metrics : *unknown_).Answered(status.code(), clock_->Now() - began_);
    reactor_->Finish(ToGrpc(status));
  }

  grpc::CallbackServerContext* const context_;
  grpc::ServerUnaryReactor* const reactor_;
  ActResponse* const response_;
  ActMetrics* const unknown_;
  Clock* const clock_;
  const absl::Time began_;
  const TraceContext trace_;
  bool finished_ = false;
};

// Slots that may wait: as many as the next batch takes, unless the configuration says more.
int64_t MaxQueue(const config::v1::PlannerService& service) {
  return service.has_max_queue() ? service.max_queue() : service.max_batch();
}

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
        on_ready_(options.on_ready),
        unknown_(*options.registry, ""),
        busy_seconds_(AddCounter(*options.registry, "planner_busy_seconds_total", "Time in which a batch was computed.")),
        models_(MakeModels(options, device)),
        batcher_(MakeBatcherOptions(options), [this](Batcher::Batch batch) { RunBatch(std::move(batch)); }),
        worker_([this] {
          while (batcher_.Step()) {
          }
        }) {}
  ~PlannerServerImpl() override { Close(); }

  grpc::Service* service() override { return this; }
  SnapshotHolder& snapshots(size_t index) override { return models_.at(index)->holder; }
  void Close() override {
    batcher_.Close();
    absl::MutexLock lock(&close_mu_);
    if (worker_.joinable()) worker_.join();
  }

  grpc::ServerUnaryReactor* Act(grpc::CallbackServerContext* context, const ActRequest* request,
                                ActResponse* response) override {
    auto call = std::make_unique<ActCall>(context, response, &unknown_, clock_);
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
    return Answer(context, [&] { return Describe(request->model(), *response); });
  }
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context, const planner::v1::ListModelsRequest*,
                                       planner::v1::ListModelsResponse* response) override {
    return Answer(context, [&] {
      for (const auto& model : models_) FillState(*model, *response->add_models());
      return absl::OkStatus();
    });
  }
  grpc::ServerUnaryReactor* Rollback(grpc::CallbackServerContext* context, const planner::v1::RollbackRequest* request,
                                     planner::v1::RollbackResponse* response) override {
    return Answer(context, [&] { return GoBack(*request, *response); });
  }
  grpc::ServerUnaryReactor* Resume(grpc::CallbackServerContext* context, const planner::v1::ResumeRequest* request,
                                   planner::v1::ResumeResponse* response) override {
    return Answer(context, [&] { return GoOn(*request, *response); });
  }

 private:
  // What `act` says, in the trace of the call.
  static grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, absl::FunctionRef<absl::Status()> act) {
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    const TraceScope trace(TraceOf(*context));
    reactor->Finish(ToGrpc(act()));
    return reactor;
  }

  std::vector<std::unique_ptr<Model>> MakeModels(const Options& options, torch::Device device) {
    SnapshotHolder::Options holder;
    holder.workers = std::make_shared<RowWorkers>(options.threads);
    holder.bfloat16 = options.service.precision() == config::v1::PlannerService::BFLOAT16;
    holder.planner = options.planner;
    holder.default_name = options.run;
    holder.device = device;
    holder.registry = options.registry;
    holder.clock = options.clock;
    holder.on_swap = [this](const ServedModel&) { TellIfReady(); };
    std::vector<std::unique_ptr<Model>> models;
    for (const std::string& name : options.models.empty() ? std::vector<std::string>{""} : options.models) {
      holder.labels = {{"model", name.empty() ? options.run : name}};
      models.push_back(std::make_unique<Model>(name, holder, options.service.max_batch()));
    }
    return models;
  }
  static Batcher::Options MakeBatcherOptions(const Options& options) {
    Batcher::Options batcher;
    batcher.max_batch = options.service.max_batch();
    batcher.max_delay = absl::Microseconds(options.service.max_delay_micros());
    batcher.max_queue = MaxQueue(options.service);
    batcher.registry = options.registry;
    batcher.clock = options.clock;
    return batcher;
  }

  void TellIfReady() {
    const bool ready = std::all_of(models_.begin(), models_.end(), [](const auto& m) { return m->holder.Get() != nullptr; });
    if (ready && !told_ready_.exchange(true) && on_ready_) on_ready_();
  }

  std::string Names() const {
    return absl::StrJoin(models_, ", ", [](std::string* out, const auto& m) { absl::StrAppend(out, "\"", m->name, "\""); });
  }

  // The model that a request names. One without a name is named by its snapshots, which CheckModelName looks at.
  absl::StatusOr<Model*> Find(const std::string& name) const {
    if (models_.size() == 1 && models_[0]->name.empty()) {
      const std::shared_ptr<const ServedModel> served = models_[0]->holder.Get();
      if (served != nullptr) RETURN_IF_ERROR(CheckModelName(*served, name));
      return models_[0].get();
    }
    if (name.empty() && models_.size() == 1) return models_[0].get();
    if (name.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("model is empty, and several are served: expected one of ", Names()));
    }
    for (const auto& model : models_) {
      if (model->name == name) return model.get();
    }
    return absl::NotFoundError(absl::StrCat("model \"", name, "\" is not served here, expected ", Names()));
  }

  absl::Status Describe(const std::string& name, planner::v1::GetModelResponse& response) const {
    ASSIGN_OR_RETURN(const Model* const model, Find(name));
    ASSIGN_OR_RETURN(const std::shared_ptr<const ServedModel> served, model->Served());
    response.set_model(served->name);
    *response.mutable_snapshot_version() = ToProto(served->version);
    response.set_model_config(ToText(served->model->config()));
    response.set_planner_config(ToText(served->info.planner));
    response.set_structure_hash(served->structure_hash);
    return absl::OkStatus();
  }

  static void FillState(const Model& model, planner::v1::ModelState& out) {
    const SnapshotHolder::State state = model.holder.state();
    const std::shared_ptr<const ServedModel> served = model.holder.Get();
    out.set_model(model.name.empty() && served != nullptr ? served->name : model.name);
    if (state.served.has_value()) *out.mutable_snapshot_version() = ToProto(*state.served);
    if (state.newest.has_value()) *out.mutable_newest_version() = ToProto(*state.newest);
    if (state.previous.has_value()) *out.mutable_previous_version() = ToProto(*state.previous);
    out.set_held(state.held);
  }

  absl::Status GoBack(const planner::v1::RollbackRequest& request, planner::v1::RollbackResponse& response) const {
    ASSIGN_OR_RETURN(Model* const model, Find(request.model()));
    std::optional<SnapshotVersion> expected;
    if (request.has_expected_version()) {
      ASSIGN_OR_RETURN(expected, FromProto(request.expected_version()));
    }
    ASSIGN_OR_RETURN(const SnapshotVersion left, model->holder.Rollback(expected));
    *response.mutable_left_version() = ToProto(left);
    FillState(*model, *response.mutable_state());
    return absl::OkStatus();
  }

  absl::Status GoOn(const planner::v1::ResumeRequest& request, planner::v1::ResumeResponse& response) const {
    ASSIGN_OR_RETURN(Model* const model, Find(request.model()));
    RETURN_IF_ERROR(model->holder.Resume());
    FillState(*model, *response.mutable_state());
    return absl::OkStatus();
  }

  // Checks everything that the client may have got wrong, so that in a batch nobody suffers from another's mistake.
  absl::Status Prepare(const grpc::CallbackServerContext& context, const ActRequest& request, ActCall& call) {
    RETURN_IF_ERROR(CheckRequest(request));
    ASSIGN_OR_RETURN(call.model, Find(request.model()));
    ASSIGN_OR_RETURN(std::shared_ptr<const ServedModel> served, call.model->Served());
    if (request.has_snapshot_version()) {
      call.pinned = true;
      served = call.model->holder.Get({request.snapshot_version().generation(), request.snapshot_version().counter()});
    }
    call.client_id = request.client_id();
    call.slots = request.slots_size();
    call.urgent = request.priority() == planner::v1::EVALUATION;
    call.deadline = absl::FromChrono(context.deadline());
    call.model_name = request.model();
    for (const planner::v1::Slot& slot : request.slots()) {
      ASSIGN_OR_RETURN(SlotInput input, ParseSlot(slot, SlotName(call.inputs.size())));
      input.seed = slot.has_seed() ? slot.seed() : DeriveSeed(random_base_, "slot", next_seed_++);
      call.inputs.push_back(std::move(input));
    }
    return Check(served, call);
  }

  static absl::Status Check(const std::shared_ptr<const ServedModel>& served, ActCall& call) {
    RETURN_IF_ERROR(CheckModelName(*served, call.model_name));
    for (size_t i = 0; i < call.inputs.size(); ++i) {
      RETURN_IF_ERROR(CheckSlot(*served, call.inputs[i], SlotName(i)));
    }
    call.checked_with = served;
    return absl::OkStatus();
  }

  // On the worker thread.
  void RunBatch(Batcher::Batch batch) {
    const absl::Time began = clock_->Now();
    // Those that share a snapshot and are as urgent as each other, in the order of the batch: what is urgent is computed first.
    std::vector<std::pair<std::shared_ptr<const ServedModel>, std::vector<ActCall*>>> groups;
    for (const auto& request : batch) {
      ActCall& call = static_cast<ActCall&>(*request);
      const std::shared_ptr<const ServedModel> newest = call.model->holder.Get();
      const bool checked = call.pinned || call.checked_with == newest;
      const absl::Status status = checked ? absl::OkStatus() : Check(newest, call);
      if (!status.ok()) {
        call.Fail(status);
        continue;
      }
      const auto same = [&call](const auto& group) {
        return group.first == call.checked_with && group.second[0]->urgent == call.urgent;
      };
      const auto group = std::find_if(groups.begin(), groups.end(), same);
      if (group != groups.end()) {
        group->second.push_back(&call);
      } else {
        groups.push_back({call.checked_with, {&call}});
      }
    }
    for (const auto& [served, calls] : groups) {
      if (calls[0]->model->together) {
        RunCalls(*served, calls);
      } else {
        RunApart(*served, calls);
      }
    }
    busy_seconds_.Increment(absl::ToDoubleSeconds(std::max(clock_->Now() - began, absl::ZeroDuration())));
  }

  // Each is answered when it is computed: nobody waits for those behind.
  void RunApart(const ServedModel& served, absl::Span<ActCall* const> calls) const {
    served.workers->RunWhole(std::ssize(calls), [&](int64_t i) { RunCalls(served, calls.subspan(i, 1)); });
  }

  // Those that somebody still waits for: a batch may take long, and calls behind others in it may have died meanwhile.
  std::vector<ActCall*> Wanted(absl::Span<ActCall* const> calls) const {
    const absl::Time now = clock_->Now();
    std::vector<ActCall*> wanted;
    for (ActCall* call : calls) {
      const absl::Status status = call->CheckWanted(now);
      if (status.ok()) {
        wanted.push_back(call);
      } else {
        call->Fail(status);
      }
    }
    return wanted;
  }

  // All of one snapshot. On any thread.
  void RunCalls(const ServedModel& served, absl::Span<ActCall* const> taken) const {
    const std::vector<ActCall*> calls = Wanted(taken);
    if (calls.empty()) return;
    std::vector<const SlotInput*> slots;
    for (const ActCall* call : calls) {
      for (const SlotInput& input : call->inputs) slots.push_back(&input);
    }
    const absl::StatusOr<std::vector<absl::StatusOr<SlotOutput>>> outputs = calls[0]->model->engine.Run(served, slots);
    if (!outputs.ok() && calls.size() > 1) {
      // One of them may be to blame: only that one shall fail.
      for (ActCall* const& call : calls) RunCalls(served, {&call, 1});
      return;
    }
    if (!outputs.ok()) {
      const TraceScope trace(calls[0]->trace());
      LogError("request failed slots={} error=\"{}\"", slots.size(), LogText(outputs.status().ToString()));
      calls[0]->Fail(outputs.status());
      return;
    }
    size_t first = 0;
    for (ActCall* call : calls) {
      FinishCall(served, *call, absl::MakeConstSpan(*outputs).subspan(first, call->inputs.size()));
      first += call->inputs.size();
    }
  }

  static void FinishCall(const ServedModel& served, ActCall& call, absl::Span<const absl::StatusOr<SlotOutput>> outputs) {
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
  const std::function<void()> on_ready_;

  std::atomic<uint64_t> next_seed_ = 0;
  std::atomic<bool> told_ready_ = false;
  ActMetrics unknown_;
  prometheus::Counter& busy_seconds_;
  const std::vector<std::unique_ptr<Model>> models_;
  Batcher batcher_;
  absl::Mutex close_mu_;
  std::thread worker_;  // last: it uses all of the above
};

absl::Status CheckInRange(absl::string_view name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("planner_service.", name, " is ", value, ", expected ", low, " to ", high));
}

absl::Status CheckNames(const std::vector<std::string>& models) {
  if (models.size() > kMaxModels) {
    return absl::InvalidArgumentError(absl::StrCat(models.size(), " models are named, expected at most ", kMaxModels));
  }
  for (auto name = models.begin(); name != models.end(); ++name) {
    if (name->empty() || name->size() > kMaxModelNameBytes) {
      return absl::InvalidArgumentError(absl::StrCat("the name of model \"", *name, "\" has ", name->size(),
                                                     " characters, expected 1 to ", kMaxModelNameBytes));
    }
    if (std::find(models.begin(), name, *name) != name) {
      return absl::InvalidArgumentError(absl::StrCat("model \"", *name, "\" is named twice, expected unique names"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<PlannerServer>> PlannerServer::Create(Options options) {
  const config::v1::PlannerService& service = options.service;
  RETURN_IF_ERROR(CheckInRange("max_batch", service.max_batch(), 1, 1024));
  RETURN_IF_ERROR(CheckInRange("max_delay_micros", service.max_delay_micros(), 0, 1000000));
  RETURN_IF_ERROR(CheckInRange("max_queue", MaxQueue(service), service.max_batch(), INT32_MAX));
  RETURN_IF_ERROR(CheckNames(options.models));
  if (options.planner.has_value()) RETURN_IF_ERROR(Annotate(Validate(*options.planner), "planner"));
  ASSIGN_OR_RETURN(const torch::Device device, ParseDevice(options.device));
  return std::make_unique<PlannerServerImpl>(options, device);
}

}  // namespace orrery
