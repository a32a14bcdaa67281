// `orrery bench load`: many simulated actors, asynchronous clients on one thread of this process, on a planner or a replay
// service.
//
// Without --rate the loop is closed: each actor sends again as soon as it is answered (after an error: when its back-off ends),
// and a latency counts from the sending. That is what so many actors see, and it adapts to the service. With --rate it is open:
// requests are due at fixed times whatever the service does, and a latency counts from when the request was due, so that one
// that had to wait for an earlier one of the same actor shows it.
#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <queue>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/client/chunk_proto.h"
#include "libs/client/planner_client.h"
#include "libs/client/status.h"
#include "orrery/planner/v1/planner.grpc.pb.h"
#include "orrery/replay/v1/replay.grpc.pb.h"
#include "tools/orrery/bench.h"
#include "tools/orrery/bench_rows.h"

namespace orrery {
namespace {

struct Flags : BenchFlags {
  std::string planner;
  std::string model;  // empty: the only one the planner serves
  std::string replay;
  int actors = 100;
  int connections = 64;
  double seconds = 10;
  double warm_up_seconds = 1;
  double timeout = 10;
  double rate = 0;  // 0: closed loop
};

// How an exchange with the service ended.
struct Outcome {
  absl::Status status;
  bool counts = true;  // false: it only prepared the next one
};

// One actor. Everything happens on the thread that drives it, and it has at most one operation under way, whose tag is the
// actor as a SimulatedActor*.
class SimulatedActor {
 public:
  virtual ~SimulatedActor() = default;
  // Begins an exchange.
  virtual void Send(absl::Time deadline) = 0;
  // The operation under way ended. Nothing: the exchange goes on with another one.
  virtual std::optional<Outcome> Proceed(bool ok) = 0;
  // Ends what is open between exchanges. True: with an operation, after which nothing is open.
  virtual bool Close() = 0;
};

// An agent at a planner: random observations, the belief and the action of the last answer.
class PlannerActor : public SimulatedActor {
 public:
  // `name` of the model for requests; empty: the only one.
  PlannerActor(const std::shared_ptr<grpc::Channel>& channel, grpc::CompletionQueue* queue, const std::string& name,
               const config::v1::Model& model, int number)
      : stub_(planner::v1::PlannerService::NewStub(channel)), queue_(queue) {
    std::mt19937_64 random(static_cast<uint64_t>(number));
    request_.set_model(name);
    request_.set_client_id(absl::StrCat("load-", getpid(), "-", number));
    planner::v1::Slot& slot = *request_.add_slots();
    slot.set_exploration_noise(0.3f);
    for (const config::v1::Modality& modality : model.modalities()) {
      common::v1::NamedTensor& observation = *slot.add_observations();
      observation.set_name(modality.name());
      *observation.mutable_tensor() = RandomTensor(modality, random);
    }
  }

  void Send(absl::Time deadline) override {
    call_.reset();  // it lies in what the context owns
    context_ = std::make_unique<grpc::ClientContext>();
    context_->set_deadline(absl::ToChronoTime(deadline));
    response_.Clear();
    call_ = stub_->AsyncAct(context_.get(), request_, queue_);
    call_->Finish(&response_, &status_, static_cast<SimulatedActor*>(this));
  }

  std::optional<Outcome> Proceed(bool) override {
    absl::Status status = FromGrpc(status_);
    if (status.ok() && response_.results_size() != 1) {
      status = absl::InternalError(absl::StrCat("the planner answered ", response_.results_size(), " slots, expected 1"));
    }
    planner::v1::Slot& slot = *request_.mutable_slots(0);
    if (status.ok()) {
      slot.set_belief(response_.results(0).belief());
      *slot.mutable_previous_action() = response_.results(0).action();
    } else if (IsFinalError(status.code())) {  // as for a model of another structure
      slot.clear_belief();
      slot.clear_previous_action();
    }
    return Outcome{std::move(status)};
  }

  bool Close() override { return false; }

 private:
  static common::v1::Tensor RandomTensor(const config::v1::Modality& modality, std::mt19937_64& random) {
    common::v1::Tensor tensor;
    if (modality.has_image()) {
      const config::v1::ImageModality& image = modality.image();
      tensor.set_data_type(common::v1::UINT8);
      for (const int64_t size : {image.height(), image.width(), image.channels()}) tensor.add_shape(size);
      std::string pixels(static_cast<size_t>(image.height()) * image.width() * image.channels(), '\0');
      std::generate(pixels.begin(), pixels.end(), [&] { return static_cast<char>(random()); });
      tensor.set_data(std::move(pixels));
    } else {
      std::vector<float> values(static_cast<size_t>(modality.vector().size()));
      std::generate(values.begin(), values.end(), [&] { return std::normal_distribution<float>()(random); });
      tensor.set_data_type(common::v1::FLOAT32);
      tensor.add_shape(modality.vector().size());
      tensor.set_data(values.data(), values.size() * sizeof(float));
    }
    return tensor;
  }

  const std::unique_ptr<planner::v1::PlannerService::Stub> stub_;
  grpc::CompletionQueue* const queue_;
  planner::v1::ActRequest request_;
  planner::v1::ActResponse response_;
  grpc::Status status_;
  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientAsyncResponseReader<planner::v1::ActResponse>> call_;
};

// An actor at replay: begins episodes and appends their chunks one by one, each acknowledged before the next.
class ReplayActor : public SimulatedActor {
 public:
  // `recorded` must outlive this. The stream of chunks ends at `end`, whatever happens.
  ReplayActor(const std::shared_ptr<grpc::Channel>& channel, grpc::CompletionQueue* queue, const std::string& run,
              const RecordedRows& recorded, int number, absl::Time end)
      : stub_(replay::v1::ReplayService::NewStub(channel)), queue_(queue), recorded_(recorded), end_(end) {
    begin_.set_run(run);
    begin_.set_actor_id(absl::StrCat("load-", getpid(), "-", number));
    begin_.set_specification_hash(recorded.specification_hash);
    append_.set_run(run);
  }

  void Send(absl::Time deadline) override {
    if (!episode_.has_value()) {
      begin_call_.reset();  // it lies in what the context owns
      begin_context_ = std::make_unique<grpc::ClientContext>();
      begin_context_->set_deadline(absl::ToChronoTime(deadline));
      begun_.Clear();
      state_ = State::kBeginning;
      begin_call_ = stub_->AsyncBeginEpisode(begin_context_.get(), begin_, queue_);
      begin_call_->Finish(&begun_, &status_, Tag());
      return;
    }
    *append_.mutable_chunk() = ToProto(MakeChunk(recorded_, *episode_, next_, recorded_.parts[next_].payload));
    if (stream_ != nullptr) {
      Write();
      return;
    }
    stream_context_ = std::make_unique<grpc::ClientContext>();
    stream_context_->set_deadline(absl::ToChronoTime(end_));
    state_ = State::kOpening;
    stream_ = stub_->PrepareAsyncAppendChunks(stream_context_.get(), queue_);
    stream_->StartCall(Tag());
  }

  std::optional<Outcome> Proceed(bool ok) override {
    if (state_ == State::kBeginning) return Begun();
    if (state_ == State::kEnding) return Ended();
    if (!ok) {
      state_ = State::kEnding;
      stream_->Finish(&status_, Tag());
      return std::nullopt;
    }
    switch (state_) {
      case State::kOpening:
        Write();
        return std::nullopt;
      case State::kWriting:
        state_ = State::kReading;
        stream_->Read(&appended_, Tag());
        return std::nullopt;
      default:
        return Acknowledged();
    }
  }

  bool Close() override {
    if (stream_ == nullptr) return false;
    stream_context_->TryCancel();
    state_ = State::kEnding;
    stream_->Finish(&status_, Tag());
    return true;
  }

 private:
  // Which operation is under way.
  enum class State { kBeginning, kOpening, kWriting, kReading, kEnding };

  void* Tag() { return static_cast<SimulatedActor*>(this); }

  void Write() {
    state_ = State::kWriting;
    stream_->Write(append_, Tag());
  }

  Outcome Begun() {
    if (!status_.ok()) return {FromGrpc(status_)};
    const absl::StatusOr<EpisodeMode> mode = FromProto(begun_.mode());
    if (begun_.run_complete()) return {absl::FailedPreconditionError("the run is complete: replay hands out no episode")};
    if (!mode.ok()) return {Annotate(mode.status(), "BeginEpisode")};
    episode_.emplace();
    episode_->run_id = begun_.run_id();
    episode_->episode_id = begun_.episode_id();
    episode_->mode = *mode;
    next_ = 0;
    return {absl::OkStatus(), /*counts=*/false};
  }

  Outcome Acknowledged() {
    const replay::v1::Chunk& sent = append_.chunk();
    if (appended_.episode_id() != sent.episode_id() || appended_.first_row() != sent.first_row()) {
      return {absl::InternalError(absl::StrCat("replay acknowledged episode ", appended_.episode_id(), " row ",
                                               appended_.first_row(), ", expected episode ", sent.episode_id(), " row ",
                                               sent.first_row()))};
    }
    next_ += 1;
    if (next_ == recorded_.parts.size()) episode_.reset();
    return {absl::OkStatus()};
  }

  // What was not acknowledged is sent again on the next stream, unless replay does not want the episode.
  Outcome Ended() {
    stream_.reset();
    absl::Status status = FromGrpc(status_);
    if (status.ok()) status = absl::UnavailableError("replay ended AppendChunks");
    if (IsFinalError(status.code())) episode_.reset();
    return {std::move(status)};
  }

  const std::unique_ptr<replay::v1::ReplayService::Stub> stub_;
  grpc::CompletionQueue* const queue_;
  const RecordedRows& recorded_;
  const absl::Time end_;
  State state_ = State::kBeginning;
  std::optional<EpisodeAssignment> episode_;
  size_t next_ = 0;  // chunk of the episode
  replay::v1::BeginEpisodeRequest begin_;
  replay::v1::BeginEpisodeResponse begun_;
  replay::v1::AppendChunksRequest append_;
  replay::v1::AppendChunksResponse appended_;
  grpc::Status status_;
  std::unique_ptr<grpc::ClientContext> begin_context_;
  std::unique_ptr<grpc::ClientAsyncResponseReader<replay::v1::BeginEpisodeResponse>> begin_call_;
  std::unique_ptr<grpc::ClientContext> stream_context_;
  std::unique_ptr<grpc::ClientAsyncReaderWriter<replay::v1::AppendChunksRequest, replay::v1::AppendChunksResponse>> stream_;
};

// What the actors met between `begin` and `end`.
class Tally {
 public:
  Tally(absl::Time begin, absl::Time end) : begin_(begin), end_(end) {}

  // Rates are of what ended inside. Latencies and errors are of what was due inside, even when it ended later: slow requests
  // are not left out.
  void Add(const absl::Status& status, absl::Time due, absl::Time now) {
    const bool ended_inside = now >= begin_ && now < end_;
    const bool due_inside = due >= begin_ && due < end_;
    if (status.ok()) {
      if (ended_inside) ++served_;
      if (due_inside) seconds_.push_back(absl::ToDoubleSeconds(now - due));
    } else if (absl::IsResourceExhausted(status)) {
      if (ended_inside) ++refused_;
    } else {
      if (due_inside) ++errors_[absl::StatusCodeToString(status.code())];
      last_error_ = status;
    }
  }
  // So many were due and never sent, because their actors still waited for an answer.
  void AddUnsent(int64_t count) { unsent_ += count; }

  int64_t served() const { return served_; }
  const absl::Status& last_error() const { return last_error_; }

  void AppendTo(nlohmann::ordered_json& result) const {
    const double window = absl::ToDoubleSeconds(end_ - begin_);
    result["served_per_second"] = static_cast<double>(served_) / window;
    result["refused_per_second"] = static_cast<double>(refused_) / window;
    result["p50_seconds"] = seconds_.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(Quantile(seconds_, 0.5));
    result["p99_seconds"] = seconds_.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(Quantile(seconds_, 0.99));
    result["unsent"] = unsent_;
    result["errors"] = nlohmann::ordered_json::object();
    for (const auto& [code, count] : errors_) result["errors"][code] = count;
  }

 private:
  const absl::Time begin_;
  const absl::Time end_;
  int64_t served_ = 0;
  int64_t refused_ = 0;
  int64_t unsent_ = 0;
  std::map<std::string, int64_t> errors_;  // by code
  absl::Status last_error_;
  std::vector<double> seconds_;
};

// Drives the actors.
class Load {
 public:
  explicit Load(const Flags& flags)
      : flags_(flags),
        start_(absl::Now()),
        end_(start_ + absl::Seconds(flags.warm_up_seconds + flags.seconds)),
        tally_(start_ + absl::Seconds(flags.warm_up_seconds), end_) {}
  ~Load() {
    queue_.Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
    }
  }

  grpc::CompletionQueue* queue() { return &queue_; }
  // When the last exchange has ended, served or not.
  absl::Time last_deadline() const { return end_ + absl::Seconds(flags_.timeout); }
  const Tally& tally() const { return tally_; }

  void Run(std::vector<std::unique_ptr<SimulatedActor>> actors) {
    driven_.reserve(actors.size());
    for (size_t i = 0; i < actors.size(); ++i) {
      // An open loop spreads the actors over one interval.
      const absl::Time due = flags_.rate > 0 ? start_ + Interval() * (static_cast<double>(i) / flags_.actors) : start_;
      driven_.push_back({std::move(actors[i]), due, Backoff(absl::Milliseconds(20), absl::Seconds(1))});
      numbers_[driven_.back().actor.get()] = i;
      due_.push({due, i});
    }
    while (running_ > 0 || absl::Now() < end_) Step();
    for (Driven& driven : driven_) {
      if (flags_.rate > 0 && driven.due < end_) tally_.AddUnsent(Unsent(driven.due));
      if (driven.actor->Close()) ++running_;
    }
    while (running_ > 0) {
      void* tag = nullptr;
      bool ok = false;
      if (!queue_.Next(&tag, &ok)) return;
      if (static_cast<SimulatedActor*>(tag)->Proceed(ok).has_value()) --running_;
    }
  }

 private:
  struct Driven {
    std::unique_ptr<SimulatedActor> actor;
    absl::Time due;  // of the exchange under way, or else of the next one
    Backoff backoff;
  };
  struct Due {
    absl::Time time;
    size_t number;
    bool operator<(const Due& other) const { return time > other.time; }  // the earliest on top
  };

  absl::Duration Interval() const { return absl::Seconds(flags_.actors / flags_.rate); }
  // Requests of one actor that are due from `due` to the end.
  int64_t Unsent(absl::Time due) const { return absl::Ceil(end_ - due, Interval()) / Interval(); }

  // Sends what is due and handles one event.
  void Step() {
    const absl::Time now = absl::Now();
    while (now < end_ && !due_.empty() && due_.top().time <= now) {
      const size_t number = due_.top().number;
      due_.pop();
      ++running_;
      Driven& driven = driven_[number];
      if (flags_.rate == 0) driven.due = absl::Now();
      driven.actor->Send(now + absl::Seconds(flags_.timeout));
    }
    absl::Time until = now < end_ ? end_ : last_deadline() + absl::Seconds(1);
    if (now < end_ && !due_.empty()) until = std::min(until, due_.top().time);
    void* tag = nullptr;
    bool ok = false;
    if (queue_.AsyncNext(&tag, &ok, absl::ToChronoTime(until)) != grpc::CompletionQueue::GOT_EVENT) return;
    SimulatedActor* const actor = static_cast<SimulatedActor*>(tag);
    const std::optional<Outcome> outcome = actor->Proceed(ok);
    if (!outcome.has_value()) return;
    --running_;
    Ended(numbers_.at(actor), *outcome);
  }

  void Ended(size_t number, const Outcome& outcome) {
    Driven& driven = driven_[number];
    const absl::Time now = absl::Now();
    const bool prepared = outcome.status.ok() && !outcome.counts;
    if (!prepared) tally_.Add(outcome.status, driven.due, now);
    if (outcome.status.ok()) driven.backoff.Reset();
    if (flags_.rate > 0) {
      if (!prepared) driven.due += Interval();
    } else {
      driven.due = outcome.status.ok() ? now : now + driven.backoff.Next();
    }
    due_.push({driven.due, number});
  }

  const Flags& flags_;
  const absl::Time start_;
  const absl::Time end_;
  Tally tally_;
  grpc::CompletionQueue queue_;
  std::vector<Driven> driven_;  // after the queue: it outlives their calls
  std::map<const SimulatedActor*, size_t> numbers_;
  std::priority_queue<Due> due_;
  int64_t running_ = 0;  // exchanges under way
};

// Channels with a connection each; MakeChannel's would share one.
std::vector<std::shared_ptr<grpc::Channel>> MakeConnections(const std::string& address, int count) {
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  for (int i = 0; i < count; ++i) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
    arguments.SetMaxSendMessageSize(kMaxMessageBytes);
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    channels.push_back(grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
  }
  return channels;
}

absl::Status Report(const Flags& flags, const Tally& tally, int connections, int rows) {
  nlohmann::ordered_json result = {{"what", "load"},
                                   {"target", flags.planner.empty() ? "replay" : "planner"},
                                   {"loop", flags.rate > 0 ? "open" : "closed"},
                                   {"actors", flags.actors},
                                   {"connections", connections},
                                   {"seconds", flags.seconds}};
  tally.AppendTo(result);
  if (rows > 0) result["rows_per_second"] = result["served_per_second"].get<double>() * rows;
  PrintResult(flags, result);
  if (tally.served() == 0 && !tally.last_error().ok()) return Annotate(tally.last_error(), "nothing was served");
  return absl::OkStatus();
}

absl::Status LoadPlanner(const Flags& flags, const std::vector<std::shared_ptr<grpc::Channel>>& channels) {
  ASSIGN_OR_RETURN(const planner::v1::GetModelResponse served,
                   PlannerClient(channels[0]).GetModel(flags.model, absl::Now() + absl::Seconds(flags.timeout)));
  ASSIGN_OR_RETURN(const config::v1::Model model, ParseModel(served.model_config()));
  RETURN_IF_ERROR(Annotate(Validate(model, /*complete=*/true), "the planner's model"));
  Load load(flags);
  std::vector<std::unique_ptr<SimulatedActor>> actors;
  for (int i = 0; i < flags.actors; ++i) {
    const auto& channel = channels[static_cast<size_t>(i) % channels.size()];
    actors.push_back(std::make_unique<PlannerActor>(channel, load.queue(), flags.model, model, i));
  }
  load.Run(std::move(actors));
  return Report(flags, load.tally(), static_cast<int>(channels.size()), /*rows=*/0);
}

absl::Status LoadReplay(const Flags& flags, const std::vector<std::shared_ptr<grpc::Channel>>& channels) {
  ASSIGN_OR_RETURN(const config::v1::Experiment experiment, LoadExperiment(flags.config, flags.set));
  ASSIGN_OR_RETURN(const RecordedRows recorded, RecordRows(experiment));
  Load load(flags);
  std::vector<std::unique_ptr<SimulatedActor>> actors;
  for (int i = 0; i < flags.actors; ++i) {
    const auto& channel = channels[static_cast<size_t>(i) % channels.size()];
    actors.push_back(
        std::make_unique<ReplayActor>(channel, load.queue(), experiment.name(), recorded, i, load.last_deadline()));
  }
  load.Run(std::move(actors));
  return Report(flags, load.tally(), static_cast<int>(channels.size()), recorded.part_rows);
}

absl::Status Run(const Flags& flags) {
  if (flags.planner.empty() == flags.replay.empty()) {
    return absl::InvalidArgumentError("give either --planner=HOST:PORT or --replay=HOST:PORT");
  }
  if (!flags.planner.empty() && !(flags.config.empty() && flags.set.empty())) {
    return absl::InvalidArgumentError("--config and --set go with --replay: a planner says itself what it takes");
  }
  if (!flags.replay.empty() && !flags.model.empty()) {
    return absl::InvalidArgumentError("--model goes with --planner: it names one of the models that a planner serves");
  }
  if (!flags.replay.empty() && flags.config.empty()) {
    return absl::InvalidArgumentError("--replay needs --config=FILE, the experiment that the service runs");
  }
  const std::string& address = flags.planner.empty() ? flags.replay : flags.planner;
  const auto channels = MakeConnections(address, std::min(flags.connections, flags.actors));
  return flags.planner.empty() ? LoadReplay(flags, channels) : LoadPlanner(flags, channels);
}

}  // namespace

void AddLoadBench(CLI::App& bench, Command& command) {
  CLI::App* part = bench.add_subcommand("load", "What many simulated actors get from a running planner or replay service");
  const auto flags = std::make_shared<Flags>();
  part->add_option("--planner", flags->planner, "Planner to load: each actor asks for one action after another")
      ->type_name("HOST:PORT");
  part->add_option("--model", flags->model, "Model to ask the planner for, where it serves several");
  part->add_option("--replay", flags->replay,
                   "Replay to load: each actor appends episodes chunk by chunk, to the run of --config, where they stay")
      ->type_name("HOST:PORT");
  AddExperimentFlags(*part, *flags, "none; needed with --replay");
  part->add_option("--actors", flags->actors, "Simulated actors")->check(CLI::Range(1, 100000))->capture_default_str();
  part->add_option("--connections", flags->connections, "Connections that the actors share")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  part->add_option("--seconds", flags->seconds, "Measured time, after the warm-up")
      ->check(CLI::Range(0.001, 1e6))
      ->capture_default_str();
  part->add_option("--warm_up", flags->warm_up_seconds, "Seconds before the measured ones")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  part->add_option("--timeout", flags->timeout, "Seconds that a request may take")
      ->check(CLI::Range(0.001, 1e6))
      ->capture_default_str();
  part->add_option("--rate", flags->rate,
                   "Requests per second of all actors together, due at fixed times: latencies count from then. 0: each actor "
                   "sends as soon as it is answered, and latencies count from the sending")
      ->check(CLI::Range(0.0, 1e9))
      ->capture_default_str();
  FinishPart(*part, command, *flags, [flags] { return Run(*flags); });
}

}  // namespace orrery
