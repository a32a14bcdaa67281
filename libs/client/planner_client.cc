#include "libs/client/planner_client.h"

#include <functional>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"

namespace orrery {
namespace {

// Nobody here cancels a call: CANCELLED comes from a server that went away with the call in its hands. INTERNAL: a device that
// was out of memory, or a connection that broke in the middle, which a proxy may call UNKNOWN.
bool WorthRetrying(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
      return true;
    default:
      return false;
  }
}

template <typename Response>
absl::StatusOr<Response> Call(absl::Time deadline,
                              const std::function<grpc::Status(grpc::ClientContext&, Response&)>& call) {
  Response response;
  RETURN_IF_ERROR(Retry(deadline,
                        {.again = WorthRetrying,
                         .backoff = Backoff(absl::Milliseconds(20), absl::Seconds(1)),
                         .shortest_try = PlannerClient::kShortestTry,
                         .what = "planner"},
                        [&](grpc::ClientContext& context) {
                          response.Clear();
                          return call(context, response);
                        }));
  return response;
}

}  // namespace

PlannerClient::PlannerClient(std::shared_ptr<grpc::Channel> channel)
    : stub_(planner::v1::PlannerService::NewStub(channel)) {}

absl::StatusOr<planner::v1::ActResponse> PlannerClient::Act(const planner::v1::ActRequest& request, absl::Time deadline) {
  ASSIGN_OR_RETURN(planner::v1::ActResponse response,
                   Call<planner::v1::ActResponse>(deadline, [&](auto& context, auto& out) {
                     return stub_->Act(&context, request, &out);
                   }));
  if (response.results_size() != request.slots_size()) {
    return absl::DataLossError(absl::StrCat("the planner answered ", response.results_size(), " slots, expected ",
                                            request.slots_size()));
  }
  return response;
}

absl::StatusOr<planner::v1::GetModelResponse> PlannerClient::GetModel(const std::string& model, absl::Time deadline) {
  planner::v1::GetModelRequest request;
  request.set_model(model);
  return Call<planner::v1::GetModelResponse>(
      deadline, [&](auto& context, auto& response) { return stub_->GetModel(&context, request, &response); });
}

absl::StatusOr<planner::v1::ListModelsResponse> PlannerClient::ListModels(absl::Time deadline) {
  return Call<planner::v1::ListModelsResponse>(
      deadline, [&](auto& context, auto& response) { return stub_->ListModels(&context, {}, &response); });
}

absl::StatusOr<planner::v1::RollbackResponse> PlannerClient::Rollback(const planner::v1::RollbackRequest& request,
                                                                      absl::Time deadline) {
  return Call<planner::v1::RollbackResponse>(
      deadline, [&](auto& context, auto& response) { return stub_->Rollback(&context, request, &response); });
}

absl::StatusOr<planner::v1::ResumeResponse> PlannerClient::Resume(const std::string& model, absl::Time deadline) {
  planner::v1::ResumeRequest request;
  request.set_model(model);
  return Call<planner::v1::ResumeResponse>(
      deadline, [&](auto& context, auto& response) { return stub_->Resume(&context, request, &response); });
}

}  // namespace orrery
