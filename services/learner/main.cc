// orrery-learner: fits the world model of one run and pushes its snapshots to planners.
#include <signal.h>
#include <torch/torch.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "libs/base/cpu.h"
#include "libs/base/host_port.h"
#include "libs/base/log.h"
#include "libs/base/shutdown.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/config/config.h"
#include "libs/device/parse_device.h"
#include "libs/learning/complete_model.h"
#include "libs/learning/data_parallel.h"
#include "libs/learning/learner.h"
#include "libs/learning/training_log.h"
#include "libs/telemetry/service_main.h"
#include "services/learner/learner_service_impl.h"

namespace orrery {
namespace {

const ServiceDefaults kDefaults{"learner", 7102, 7202, 9102};
constexpr int64_t kLogEveryUpdates = 10;
constexpr int kPortsBetweenRanks = 10;
constexpr absl::Duration kSignalPoll = absl::Milliseconds(100);

struct LearnerFlags {
  CommonFlags common;
  std::string replay = "127.0.0.1:7101";
  std::string checkpoint_dir;
  std::string log_dir;
  bool resume = false;
  std::string device = "cpu";
  int threads = 0;
  double rank_limit = 60;
};

void AddFlags(CLI::App& app, LearnerFlags& flags) {
  AddCommonFlags(app, kDefaults, flags.common);
  app.get_option("--config")->required();
  app.add_option("--replay", flags.replay, "Replay service of the run")->type_name("HOST:PORT")->capture_default_str();
  app.add_option("--checkpoint_dir", flags.checkpoint_dir, "Folder of the checkpoints; default: none are kept")
      ->type_name("FOLDER");
  app.add_option("--log_dir", flags.log_dir, "Folder for learner.csv and TensorBoard events; default: none are written")
      ->type_name("FOLDER");
  app.add_flag("--resume", flags.resume, "Go on from the newest checkpoint, where there is one");
  app.add_option("--device", flags.device, "cpu, cuda or cuda:N")->capture_default_str();
  app.add_option("--threads", flags.threads, "Threads that compute; 0: as many as affinity and cgroup leave")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app.add_option("--rank_limit", flags.rank_limit,
                 "Seconds after which a rank that does not answer counts as lost, where several learn together")
      ->check(CLI::Range(30.0, 86400.0))
      ->capture_default_str();
}

// Waits for the other ranks. SIGINT or SIGTERM meanwhile ends the process at once: it holds nothing yet.
absl::StatusOr<std::unique_ptr<DataParallel>> Join(const DataParallel::Options& options) {
  absl::StatusOr<std::unique_ptr<DataParallel>> group = absl::UnknownError("still waiting");
  absl::Notification done;
  std::thread thread([&] {
    group = DataParallel::Join(options);
    done.Notify();
  });
  const absl::Time give_up = absl::Now() + options.join_limit + 3 * options.limit;  // to join NCCL has no limit of its own
  while (!done.HasBeenNotified()) {
    if (absl::Now() >= give_up) {
      LogError("the ranks did not come together rank={} size={}", options.rank, options.size);
      std::_Exit(1);
    }
    if (WaitForShutdownSignal(kSignalPoll) == 0) continue;
    LogInfo("stopped while waiting for the other ranks rank={} size={}", options.rank, options.size);
    std::_Exit(0);
  }
  thread.join();
  return group;
}

// The group that torchrun's variables name; null: none. Ranks of one machine that were started with the same flags get a GPU
// each, and ports for health and metrics.
absl::StatusOr<std::unique_ptr<DataParallel>> JoinGroup(LearnerFlags& flags, torch::Device& device) {
  ASSIGN_OR_RETURN(std::optional<DataParallel::Options> options, DataParallel::FromEnvironment());
  if (!options.has_value()) return nullptr;
  if (device.is_cuda() && !device.has_index()) device.set_index(static_cast<c10::DeviceIndex>(options->local_rank));
  if (device.is_cuda() && device.index() >= static_cast<int64_t>(torch::cuda::device_count())) {
    return absl::InvalidArgumentError(absl::StrCat("LOCAL_RANK is ", options->local_rank, ", but there is no GPU ", device.str()));
  }
  if (options->rank != 0) flags.common.listen = "127.0.0.1:0";  // serves nothing: planners are given rank 0's address
  for (std::string* address : {&flags.common.health_listen, &flags.common.metrics_listen}) {
    const std::optional<HostPort> given = ParseHostPort(*address);
    if (!given.has_value() || given->port == 0) continue;
    const int port = given->port + kPortsBetweenRanks * options->local_rank;
    *address = absl::StrCat(address->substr(0, address->rfind(':') + 1), port);
  }
  options->device = device;
  options->limit = absl::Seconds(flags.rank_limit);
  return Join(*options);
}

// The learning curve as learner.csv and events in one folder; opened at the first update, when it is known where learning
// goes on. The learner's thread only.
class CurveWriter {
 public:
  explicit CurveWriter(std::string folder) : folder_(std::move(folder)) {}

  void Add(const Learner::UpdateReport& report) {
    if (folder_.empty() || failed_) return;
    const absl::Status status = Write(report);
    if (status.ok()) return;
    failed_ = true;
    LogError("the learning curve is not written any more reason={}", status.ToString());
  }

 private:
  absl::Status Open(int64_t first_update) {
    ASSIGN_OR_RETURN(events_, EventLog::Create(folder_, first_update, absl::Now()));
    std::vector<std::string> columns;
    for (const std::string& term : LossTerms()) columns.push_back("loss/" + term);
    columns.insert(columns.end(), {"gradient_norm", "update_seconds", "batch_wait_seconds", "rows"});
    ASSIGN_OR_RETURN(csv_, CsvLog::Open(folder_ + "/learner.csv", std::move(columns), first_update - 1));
    return absl::OkStatus();
  }

  absl::Status Write(const Learner::UpdateReport& report) {
    if (csv_ == nullptr) RETURN_IF_ERROR(Open(report.updates));
    if (report.updates % kLogEveryUpdates != 0) return absl::OkStatus();
    std::map<std::string, double> values = {{"gradient_norm", report.result.gradient_norm},
                                            {"update_seconds", report.update_seconds},
                                            {"batch_wait_seconds", report.batch_wait_seconds},
                                            {"rows", static_cast<double>(report.rows_appended)}};
    for (const auto& [term, loss] : report.result.losses) values["loss/" + term] = loss;
    RETURN_IF_ERROR(csv_->Add(report.updates, values));
    return events_->Add(report.updates, absl::Now(), values);
  }

  const std::string folder_;
  std::unique_ptr<CsvLog> csv_;
  std::unique_ptr<EventLog> events_;
  bool failed_ = false;
};

absl::Status Serve(LearnerFlags flags) {
  torch::set_num_threads(1);
  torch::set_num_interop_threads(1);
  ASSIGN_OR_RETURN(const config::v1::Experiment loaded, LoadExperiment(flags.common.config, flags.common.set));
  Learner::Options options;
  ASSIGN_OR_RETURN(options.experiment, CompleteExperiment(loaded));
  LogInfo("configuration\n{}", ToText(options.experiment));
  ASSIGN_OR_RETURN(options.device, ParseDevice(flags.device));
  options.threads = ThreadsOf(flags.threads);
  ASSIGN_OR_RETURN(const std::unique_ptr<DataParallel> group, JoinGroup(flags, options.device));
  options.group = group.get();
  const bool leads = group == nullptr || group->rank() == 0;
  if (!leads) flags.log_dir.clear();  // the curve is rank 0's
  ASSIGN_OR_RETURN(const std::shared_ptr<grpc::Channel> replay, MakeChannel(flags.replay));

  HostOptions host_options = MakeHostOptions(kDefaults, flags.common);
  const std::shared_ptr<prometheus::Registry> registry = host_options.registry;
  const std::string run = options.experiment.name();
  SnapshotPublisher publisher;
  CurveWriter curve(flags.log_dir);
  std::unique_ptr<ServiceHost> host;
  options.learner_id = MakeProcessId(kDefaults.name);
  options.checkpoint_dir = flags.checkpoint_dir;
  options.resume = flags.resume;
  options.replay = std::make_shared<ReplayClient>(replay, run);
  options.watcher = ChunkWatcher::Create(replay, run);
  options.publisher = &publisher;
  options.registry = registry.get();
  options.on_update = [&](const Learner::UpdateReport& report) { curve.Add(report); };
  options.on_snapshot = [&](SnapshotVersion, const std::string&) { host->SetReady(true); };
  ASSIGN_OR_RETURN(const std::unique_ptr<Learner> learner, Learner::Create(std::move(options)));

  LearnerServiceImpl service(run, &publisher, [&] {
    const Learner::Progress progress = learner->progress();
    return LearnerServiceImpl::Progress{progress.updates, progress.loss};
  });
  if (leads) host_options.services = {&service};
  ASSIGN_OR_RETURN(host, ServiceHost::Start(std::move(host_options)));
  if (!leads) host->SetReady(true);

  absl::Status result;
  std::thread thread([&] {
    result = learner->Run();
    // A learner that cannot go on ends the process the same way as an operator does. One whose run is complete goes on
    // serving its last snapshot. The other ranks end with rank 0.
    if (!result.ok() || (!leads && learner->stopped())) kill(getpid(), SIGTERM);
  });
  AwaitShutdown(*host, kDefaults.name, [&] {
    learner->Stop();
    thread.join();
    publisher.Close();
  });
  host.reset();  // before the service that it serves
  return result;
}

}  // namespace
}  // namespace orrery

int main(int argc, char** argv) {
  orrery::LearnerFlags flags;
  // Under ALTERNATE a planner whose subscription is being made anew would not be waited for, and there are no replicas to share with.
  flags.common.max_connection_age = 0;
  CLI::App app("Fits the world model of a run and pushes its snapshots to planners.");
  orrery::AddFlags(app, flags);
  return orrery::RunProgram(argc, argv, app, "orrery-learner", flags.common, [&] { return orrery::Serve(flags); });
}
