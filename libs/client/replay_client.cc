#include "libs/client/replay_client.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/client/chunk_proto.h"
#include "libs/client/status.h"
#include "libs/replay/chunk_text.h"

namespace orrery {
namespace {
std::unique_ptr<replay::v1::ReplayService::Stub> Stub(const std::shared_ptr<grpc::Channel>& channel) {
  return replay::v1::ReplayService::NewStub(channel);
}
}  // namespace

ReplayClient::ReplayClient(std::shared_ptr<grpc::Channel> channel, std::string run)
    : channel_(std::move(channel)), run_(std::move(run)) {}

std::string ReplayClient::TakeQuestion(const std::string& actor_id) {
  absl::MutexLock lock(&mu_);
  auto unanswered = unanswered_.extract(actor_id);
  return unanswered.empty() ? RandomIdentity() : std::move(unanswered.mapped());
}

absl::StatusOr<std::optional<ReplayClient::Episode>> ReplayClient::BeginEpisode(const std::string& actor_id,
                                                                                uint64_t specification_hash,
                                                                                absl::Time deadline) {
  replay::v1::BeginEpisodeRequest request;
  request.set_run(run_);
  request.set_actor_id(actor_id);
  request.set_specification_hash(specification_hash);
  request.set_request_id(TakeQuestion(actor_id));
  replay::v1::BeginEpisodeResponse response;
  const absl::Status status = RetryUnavailable(deadline, [&](grpc::ClientContext& context) {
    return Stub(channel_)->BeginEpisode(&context, request, &response);
  });
  if (!status.ok() && !IsFinalError(status.code())) {
    absl::MutexLock lock(&mu_);
    unanswered_.emplace(actor_id, request.request_id());
  }
  if (status.code() == absl::StatusCode::kDeadlineExceeded) return std::nullopt;
  RETURN_IF_ERROR(status);
  Episode episode;
  episode.assignment.run_id = response.run_id();
  episode.assignment.run_complete = response.run_complete();
  if (response.run_complete()) return episode;
  episode.assignment.episode_id = response.episode_id();
  ASSIGN_OR_RETURN(episode.assignment.mode, FromProto(response.mode()));
  episode.assignment.seed = response.seed();
  episode.assignment.task = response.task();
  episode.lease_seconds = response.lease_seconds();
  return episode;
}

absl::StatusOr<int64_t> ReplayClient::AcquireLearner(const std::string& learner_id, absl::Time deadline) {
  replay::v1::AcquireLearnerRequest request;
  request.set_run(run_);
  request.set_learner_id(learner_id);
  replay::v1::AcquireLearnerResponse response;
  RETURN_IF_ERROR(RetryUnavailable(deadline, [&](grpc::ClientContext& context) {
    return Stub(channel_)->AcquireLearner(&context, request, &response);
  }));
  return response.generation();
}

absl::StatusOr<RunCoordinator::Grant> ReplayClient::ReserveUpdates(int64_t generation, int64_t updates_done,
                                                                   int32_t wanted, absl::Time deadline) {
  replay::v1::ReserveUpdatesRequest request;
  request.set_run(run_);
  request.set_generation(generation);
  request.set_updates_done(updates_done);
  request.set_updates_wanted(wanted);
  replay::v1::ReserveUpdatesResponse response;
  const absl::Status status = RetryUnavailable(deadline, [&](grpc::ClientContext& context) {
    return Stub(channel_)->ReserveUpdates(&context, request, &response);
  });
  // The service answers shortly before the deadline; an answer that comes late says the same: none until then.
  if (status.code() == absl::StatusCode::kDeadlineExceeded) return RunCoordinator::Grant{};
  RETURN_IF_ERROR(status);
  RunCoordinator::Grant grant;
  grant.updates = response.updates_granted();
  grant.run_complete = response.run_complete();
  return grant;
}

absl::Status ReplayClient::ReleaseLearner(int64_t generation, int64_t updates_done, absl::Time deadline) {
  replay::v1::ReserveUpdatesRequest request;
  request.set_run(run_);
  request.set_generation(generation);
  request.set_updates_done(updates_done);
  request.set_release(true);
  replay::v1::ReserveUpdatesResponse response;
  return RetryUnavailable(deadline, [&](grpc::ClientContext& context) {
    return Stub(channel_)->ReserveUpdates(&context, request, &response);
  });
}

absl::Status ReplayClient::PutSnapshot(const Store::Snapshot& snapshot, absl::Time deadline) {
  absl::Status split;
  const absl::Status status = RetryUnavailable(deadline, [&](grpc::ClientContext& context) {
    replay::v1::PutSnapshotResponse response;
    auto stub = Stub(channel_);
    auto stream = stub->PutSnapshot(&context, &response);
    replay::v1::PutSnapshotRequest request;
    request.set_run(run_);
    split = SplitSnapshot(snapshot, [&](const common::v1::SnapshotPart& part) {
      *request.mutable_part() = part;
      return stream->Write(request);
    });
    if (absl::IsInvalidArgument(split)) context.TryCancel();
    stream->WritesDone();
    return stream->Finish();
  });
  if (absl::IsInvalidArgument(split)) return split;
  return status;
}

absl::StatusOr<Store::Snapshot> ReplayClient::GetSnapshot(absl::Time deadline) {
  replay::v1::GetSnapshotRequest request;
  request.set_run(run_);
  SnapshotAssembler assembler;
  absl::StatusOr<bool> complete = false;
  RETURN_IF_ERROR(RetryUnavailable(deadline, [&](grpc::ClientContext& context) {
    auto stub = Stub(channel_);
    auto stream = stub->GetSnapshot(&context, request);
    assembler.Take();
    complete = false;
    replay::v1::GetSnapshotResponse response;
    while (complete.ok() && stream->Read(&response)) {
      if (*complete) {
        complete = absl::DataLossError("the service sent more parts than the snapshot has");
      } else {
        complete = assembler.Add(response.part());
      }
    }
    if (!complete.ok()) {
      context.TryCancel();
      stream->Finish();
      return grpc::Status::OK;  // reported below
    }
    return stream->Finish();
  }));
  RETURN_IF_ERROR(complete.status());
  if (!*complete) return absl::DataLossError("the service ended the stream before the snapshot was complete");
  return assembler.Take();
}

absl::StatusOr<replay::v1::GetStatsResponse> ReplayClient::GetStats(absl::Time deadline) {
  replay::v1::GetStatsRequest request;
  request.set_run(run_);
  replay::v1::GetStatsResponse response;
  RETURN_IF_ERROR(RetryUnavailable(deadline, [&](grpc::ClientContext& context) {
    return Stub(channel_)->GetStats(&context, request, &response);
  }));
  return response;
}

absl::StatusOr<replay::v1::ListEpisodesResponse> ReplayClient::ListEpisodes(int64_t first, int max,
                                                                            replay::v1::EpisodeMode mode,
                                                                            absl::Time deadline) {
  replay::v1::ListEpisodesRequest request;
  request.set_run(run_);
  request.set_first_episode_id(first);
  request.set_page_size(max);
  request.set_mode(mode);
  replay::v1::ListEpisodesResponse response;
  RETURN_IF_ERROR(RetryUnavailable(deadline, [&](grpc::ClientContext& context) {
    return Stub(channel_)->ListEpisodes(&context, request, &response);
  }));
  return response;
}

absl::StatusOr<std::vector<Chunk>> ReplayClient::GetEpisode(int64_t episode_id, absl::Time deadline) {
  replay::v1::GetEpisodeRequest request;
  request.set_run(run_);
  request.set_episode_id(episode_id);
  std::vector<Chunk> chunks;
  absl::Status wrong;
  RETURN_IF_ERROR(RetryUnavailable(deadline, [&](grpc::ClientContext& context) {
    auto stub = Stub(channel_);
    auto stream = stub->GetEpisode(&context, request);
    chunks.clear();
    replay::v1::GetEpisodeResponse response;
    while (wrong.ok() && stream->Read(&response)) {
      absl::StatusOr<Chunk> chunk = FromProto(std::move(*response.mutable_chunk()));
      if (chunk.ok()) {
        chunks.push_back(*std::move(chunk));
      } else {
        wrong = absl::DataLossError(absl::StrCat("replay sent a wrong chunk: ", chunk.status().message()));
      }
    }
    if (wrong.ok()) return stream->Finish();
    context.TryCancel();
    stream->Finish();
    return grpc::Status(grpc::Status::OK);  // reported below
  }));
  RETURN_IF_ERROR(wrong);
  if (chunks.empty()) return absl::DataLossError(absl::StrCat("replay sent no chunk of episode ", episode_id));
  return chunks;
}

}  // namespace orrery
