#include "libs/client/planner_client.h"

#include <functional>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/client/status.h"

namespace orrery {
namespace {

bool WorthRetrying(absl::StatusCode code) {
  return code == absl::StatusCode::kUnavailable || code == absl::StatusCode::kResourceExhausted;
}

absl::Status Retry(absl::Time deadline, const std::function<grpc::Status(grpc::ClientContext&)>& call) {
  Backoff backoff(absl::Milliseconds(20), absl::Seconds(1));
  while (true) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(deadline));
    absl::Status status = FromGrpc(call(context));
    if (!WorthRetrying(status.code())) return status;
    const absl::Duration wait = backoff.Next();
    if (absl::Now() + wait >= deadline) return Annotate(status, "planner, until the deadline");
    absl::SleepFor(wait);
  }
}

}  // namespace

PlannerClient::PlannerClient(std::shared_ptr<grpc::Channel> channel)
    : stub_(planner::v1::PlannerService::NewStub(channel)) {}

absl::StatusOr<planner::v1::ActResponse> PlannerClient::Act(const planner::v1::ActRequest& request, absl::Time deadline) {
  planner::v1::ActResponse response;
  RETURN_IF_ERROR(Retry(deadline, [&](grpc::ClientContext& context) {
    response.Clear();
    return stub_->Act(&context, request, &response);
  }));
  if (response.results_size() != request.slots_size()) {
    return absl::InternalError(absl::StrCat("the planner answered ", response.results_size(), " slots, expected ",
                                            request.slots_size()));
  }
  return response;
}

absl::StatusOr<planner::v1::GetModelResponse> PlannerClient::GetModel(const std::string& model, absl::Time deadline) {
  planner::v1::GetModelRequest request;
  request.set_model(model);
  planner::v1::GetModelResponse response;
  RETURN_IF_ERROR(Retry(deadline, [&](grpc::ClientContext& context) {
    response.Clear();
    return stub_->GetModel(&context, request, &response);
  }));
  return response;
}

}  // namespace orrery
