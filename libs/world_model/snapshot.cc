#include "libs/world_model/snapshot.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "libs/base/array.h"
#include "libs/base/file.h"
#include "libs/base/status.h"
#include "libs/tensors/safetensors.h"
#include "libs/world_model/layout.h"

namespace orrery {
namespace {

constexpr char kModel[] = "orrery.model", kPlanner[] = "orrery.planner", kRun[] = "orrery.run",
               kGeneration[] = "orrery.generation", kCounter[] = "orrery.counter", kFormat[] = "orrery.format";
constexpr char kFormatVersion[] = "1";

using Metadata = std::map<std::string, std::string>;

absl::Status ReadNumber(const Metadata& metadata, const std::string& key, int64_t& out) {
  const auto it = metadata.find(key);
  if (it == metadata.end()) return absl::OkStatus();
  if (absl::SimpleAtoi(it->second, &out) && out >= 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("metadata ", key, " is '", it->second, "'; expected a number of at least 0"));
}

absl::StatusOr<SnapshotInfo> ReadInfo(const Metadata& metadata) {
  if (const auto it = metadata.find(kFormat); it != metadata.end() && it->second != kFormatVersion)
    return absl::InvalidArgumentError(
        absl::StrCat("metadata ", kFormat, " is '", it->second, "'; this program reads ", kFormatVersion));
  const auto model = metadata.find(kModel);
  if (model == metadata.end())
    return absl::InvalidArgumentError(absl::StrCat("metadata ", kModel, " is missing: not a snapshot of a model"));
  SnapshotInfo info;
  auto parsed = ParseModel(model->second);
  if (!parsed.ok()) return Annotate(parsed.status(), kModel);
  info.model = *std::move(parsed);
  RETURN_IF_ERROR(Annotate(Validate(info.model, /*complete=*/true), kModel));
  if (const auto it = metadata.find(kPlanner); it != metadata.end()) {
    auto planner = ParsePlanner(it->second);
    if (!planner.ok()) return Annotate(planner.status(), kPlanner);
    info.planner = *std::move(planner);
  }
  if (info.planner.algorithm_case() == config::v1::Planner::ALGORITHM_NOT_SET) info.planner.mutable_cem();
  RETURN_IF_ERROR(Annotate(Validate(info.planner), kPlanner));
  if (const auto it = metadata.find(kRun); it != metadata.end()) info.run = it->second;
  RETURN_IF_ERROR(ReadNumber(metadata, kGeneration, info.generation));
  RETURN_IF_ERROR(ReadNumber(metadata, kCounter, info.counter));
  return info;
}

absl::Status CheckParameters(const std::vector<ParameterSpec>& layout, const TensorMap& tensors) {
  for (const ParameterSpec& spec : layout) {
    const auto it = tensors.find(spec.name);
    if (it == tensors.end())
      return absl::InvalidArgumentError(
          absl::StrCat("parameter ", spec.name, " is missing; expected float32 ", ShapeString(spec.shape)));
    const torch::Tensor& t = it->second;
    const std::vector<int64_t> shape = t.sizes().vec();
    if (t.scalar_type() != at::kFloat || shape != spec.shape)
      return absl::InvalidArgumentError(absl::StrCat("parameter ", spec.name, " is ", at::toString(t.scalar_type()), " ",
                                                     ShapeString(shape), "; expected float32 ",
                                                     ShapeString(spec.shape)));
    if (!at::isfinite(t).all().item<bool>())
      return absl::InvalidArgumentError(absl::StrCat("parameter ", spec.name, " holds a number that is not finite"));
  }
  if (tensors.size() == layout.size()) return absl::OkStatus();
  TensorMap unknown = tensors;
  for (const ParameterSpec& spec : layout) unknown.erase(spec.name);
  return absl::InvalidArgumentError(absl::StrCat("parameter ", unknown.begin()->first, " is unknown to this model"));
}

}  // namespace

absl::StatusOr<std::string> SerializeSnapshot(const WorldModel& model, const SnapshotInfo& info) {
  SafeTensors file;
  for (const auto& parameter : model.named_parameters())
    file.tensors.emplace(parameter.key(), parameter.value().detach().to(at::kCPU).contiguous());
  file.metadata = {{kFormat, kFormatVersion},
                   {kModel, ToText(info.model)},
                   {kPlanner, ToText(info.planner)},
                   {kRun, info.run},
                   {kGeneration, absl::StrCat(info.generation)},
                   {kCounter, absl::StrCat(info.counter)}};
  return SerializeSafeTensors(file);
}

absl::StatusOr<ModelSnapshot> ParseSnapshot(absl::string_view bytes) {
  ASSIGN_OR_RETURN(SafeTensors file, ParseSafeTensors(bytes));
  ModelSnapshot snapshot;
  ASSIGN_OR_RETURN(snapshot.info, ReadInfo(file.metadata));
  RETURN_IF_ERROR(CheckParameters(ParameterLayout(snapshot.info.model), file.tensors));
  ASSIGN_OR_RETURN(snapshot.model, WorldModel::Create(snapshot.info.model, /*seed=*/0));
  torch::NoGradGuard no_grad;
  for (auto& parameter : snapshot.model->named_parameters()) parameter.value().copy_(file.tensors.at(parameter.key()));
  return snapshot;
}

absl::StatusOr<ModelSnapshot> LoadSnapshot(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string bytes, ReadFile(path));
  auto snapshot = ParseSnapshot(bytes);
  if (!snapshot.ok()) return Annotate(snapshot.status(), path);
  return snapshot;
}

}  // namespace orrery
