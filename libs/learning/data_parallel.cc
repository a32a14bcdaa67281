#include "libs/learning/data_parallel.h"

#include <cstdlib>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/learning/gloo_declarations.h"
#include "libs/learning/nccl_sum.h"

#define USE_C10D_GLOO
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

namespace orrery {
namespace {

constexpr int kMaxSize = 4096;
constexpr int64_t kMaxBytes = int64_t{1} << 36;
constexpr char kPrefix[] = "orrery";
constexpr char kComplete[] = "complete";

std::optional<std::string> Variable(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr) return std::nullopt;
  return std::string(value);
}

// A whole number from `low` to `high`; `otherwise` where the variable is not set.
absl::StatusOr<int> Number(const char* name, int low, int high, std::optional<int> otherwise = std::nullopt) {
  const std::optional<std::string> text = Variable(name);
  if (!text.has_value() && otherwise.has_value()) return *otherwise;
  int value = 0;
  if (!text.has_value() || !absl::SimpleAtoi(*text, &value) || value < low || value > high) {
    return absl::InvalidArgumentError(absl::StrCat(
        "variable ", name, text.has_value() ? absl::StrCat(" is \"", *text, "\"") : std::string(" is not set"),
        "; expected a number from ", low, " to ", high, " (it belongs to WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT)"));
  }
  return value;
}

absl::Status Check(const DataParallel::Options& options) {
  if (options.size < 1 || options.size > kMaxSize || options.rank < 0 || options.rank >= options.size) {
    return absl::InvalidArgumentError(absl::StrCat("rank ", options.rank, " of ", options.size,
                                                   ": expected a rank from 0 below their number, which is at most ", kMaxSize));
  }
  if (options.limit < absl::Seconds(1) || options.join_limit < absl::Seconds(1)) {
    return absl::InvalidArgumentError(absl::StrCat("time limits of a group are ", absl::FormatDuration(options.limit), " and ",
                                                   absl::FormatDuration(options.join_limit), ", expected 1s or more"));
  }
  return absl::OkStatus();
}

}  // namespace

struct DataParallel::Group {
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<c10d::Backend> gloo;
  std::unique_ptr<NcclSum> nccl;  // on a GPU
};

absl::StatusOr<std::optional<DataParallel::Options>> DataParallel::FromEnvironment() {
  Options options;
  ASSIGN_OR_RETURN(options.size, Number("WORLD_SIZE", 1, kMaxSize, 1));
  if (options.size == 1) return std::nullopt;
  ASSIGN_OR_RETURN(options.rank, Number("RANK", 0, options.size - 1));
  ASSIGN_OR_RETURN(options.local_rank, Number("LOCAL_RANK", 0, options.size - 1, 0));
  ASSIGN_OR_RETURN(options.master_port, Number("MASTER_PORT", 1, 65535));
  options.master_address = Variable("MASTER_ADDR").value_or("");
  if (options.master_address.empty()) {
    return absl::InvalidArgumentError("variable MASTER_ADDR is not set; expected the host name or address of rank 0");
  }
  // torchrun serves the store itself, for all attempts.
  options.serve_store = Variable("TORCHELASTIC_USE_AGENT_STORE").value_or("") != "True";
  // Rank 0's own store is new at every attempt; torchrun's nodes may count restarts differently.
  options.store_prefix = options.serve_store ? "0" : Variable("TORCHELASTIC_RESTART_COUNT").value_or("0");
  return options;
}

absl::StatusOr<std::unique_ptr<DataParallel>> DataParallel::Join(const Options& options) {
  RETURN_IF_ERROR(Check(options));
  auto joined = std::unique_ptr<DataParallel>(new DataParallel(options));
  RETURN_IF_ERROR(joined->Connect());
  LogInfo("joined the group rank={} size={} master={}:{} device={}", options.rank, options.size, options.master_address,
          options.master_port, options.device.str());
  return joined;
}

DataParallel::DataParallel(Options options) : options_(std::move(options)), group_(std::make_unique<Group>()) {}

DataParallel::~DataParallel() = default;

absl::Status DataParallel::Connect() {
  RETURN_IF_ERROR(Try("joining the group", [this] {
    c10d::TCPStoreOptions tcp;
    tcp.port = static_cast<uint16_t>(options_.master_port);
    tcp.isServer = options_.serve_store && options_.rank == 0;
    tcp.waitWorkers = false;
    tcp.timeout = absl::ToChronoMilliseconds(options_.join_limit);
    group_->store = c10::make_intrusive<c10d::PrefixStore>(
        absl::StrCat(kPrefix, "/", options_.store_prefix),
        c10::make_intrusive<c10d::TCPStore>(options_.master_address, tcp));
    TORCH_CHECK(group_->store->add(absl::StrCat("rank", options_.rank), 1) == 1, "rank ", options_.rank,
                " was in this group before: all ranks have to be started again");
    if (group_->store->add("joined", 1) == options_.size) group_->store->set(kComplete, std::vector<uint8_t>{1});
    group_->store->wait({kComplete}, absl::ToChronoMilliseconds(options_.join_limit));
    group_->gloo = c10::make_intrusive<c10d::ProcessGroupGloo>(
        group_->store, options_.rank, options_.size,
        c10d::ProcessGroupGloo::Options::create_default(absl::ToChronoMilliseconds(options_.limit)));
  }));
  if (!options_.device.is_cuda()) return absl::OkStatus();
  std::string id;
  if (options_.rank == 0) RETURN_IF_ERROR(Try("making a communicator of NCCL", [&] { id = NcclSum::MakeId(); }));
  RETURN_IF_ERROR(Broadcast(id));
  return Try("joining the communicator of NCCL",
             [&] { group_->nccl = NcclSum::Create(id, options_.rank, options_.size, options_.device); });
}

absl::Status DataParallel::Try(const char* what, absl::FunctionRef<void()> call) {
  if (!failure_.ok()) return failure_;
  const absl::Status status = CatchExceptions(what, [&] {
    call();
    return absl::OkStatus();
  });
  if (!status.ok()) {
    failure_ = absl::UnavailableError(absl::StrCat("rank ", options_.rank, " of ", options_.size,
                                                   ": a rank was lost, or did not come within ",
                                                   absl::FormatDuration(options_.limit), " (", status.message(), ")"));
  }
  return failure_;
}

absl::Status DataParallel::Mean(torch::Tensor& values) {
  return Try("averaging over ranks", [&] {
    const torch::NoGradGuard no_grad;
    if (values.is_cuda()) {
      TORCH_CHECK(group_->nccl != nullptr, "values lie on ", values.device().str(), ", the group was made for ",
                  options_.device.str());
      group_->nccl->Run(values, options_.limit);
    } else {
      std::vector<torch::Tensor> tensors = {values};
      group_->gloo->allreduce(tensors)->wait();
    }
    values.div_(options_.size);
  });
}

absl::StatusOr<int64_t> DataParallel::Sum(int64_t number) {
  std::vector<torch::Tensor> tensors = {torch::full({1}, number, torch::kInt64)};
  RETURN_IF_ERROR(Try("adding over ranks", [&] { group_->gloo->allreduce(tensors)->wait(); }));
  return tensors[0].item<int64_t>();
}

absl::Status DataParallel::Broadcast(absl::Span<int64_t> numbers) {
  return Try("hearing from rank 0", [&] {
    std::vector<torch::Tensor> tensors = {
        torch::from_blob(numbers.data(), {static_cast<int64_t>(numbers.size())}, torch::kInt64)};
    group_->gloo->broadcast(tensors)->wait();
  });
}

absl::Status DataParallel::Broadcast(std::string& bytes) {
  int64_t size = static_cast<int64_t>(bytes.size());
  RETURN_IF_ERROR(Broadcast(absl::MakeSpan(&size, 1)));
  if (size < 0 || size > kMaxBytes) {
    return absl::InternalError(absl::StrCat("rank 0 announced ", size, " bytes, expected 0 to ", kMaxBytes));
  }
  return Try("receiving bytes of rank 0", [&] {
    bytes.resize(static_cast<size_t>(size));
    if (size == 0) return;
    std::vector<torch::Tensor> tensors = {torch::from_blob(bytes.data(), {size}, torch::kUInt8)};
    group_->gloo->broadcast(tensors)->wait();
  });
}

torch::Tensor DataParallel::Part(const torch::Tensor& whole, int64_t dim) const {
  if (!whole.defined()) return whole;
  const int64_t columns = whole.size(dim) / options_.size;
  return whole.narrow(dim, options_.rank * columns, columns).contiguous();
}

}  // namespace orrery
