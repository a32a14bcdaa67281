#include "services/replay/append_streams.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "libs/base/status_matchers.h"
#include "libs/client/status.h"

namespace orrery {
namespace {
using replay::v1::AppendChunksRequest;
using replay::v1::AppendChunksResponse;
using ClientStream = grpc::ClientReaderWriter<AppendChunksRequest, AppendChunksResponse>;

class Service : public replay::v1::ReplayService::WithCallbackMethod_AppendChunks<replay::v1::ReplayService::Service> {
 public:
  explicit Service(AppendStreams* streams) : streams_(streams) {}
  using WithCallbackMethod_AppendChunks::AppendChunks;
  AppendStreams::Stream* AppendChunks(grpc::CallbackServerContext* context) override { return streams_->Open(context); }

 private:
  AppendStreams* const streams_;
};

// Its handler answers chunks (those of episode 0 once open_ is set), takes other messages in silence, and refuses the run
// "wrong".
class AppendStreamsTest : public ::testing::Test {
 protected:
  void Start(int max_threads) {
    streams_.emplace(AppendStreams::Handler{[this](const AppendMessage& message, AppendChunksResponse& response) {
                                              return Take(message, response);
                                            },
                                            [this] { return End(); }},
                     max_threads);
    service_.emplace(&*streams_);
    grpc::ServerBuilder builder;
    builder.RegisterService(&*service_);
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    stub_ = replay::v1::ReplayService::NewStub(server_->InProcessChannel({}));
  }
  void TearDown() override {
    server_->Shutdown(absl::ToChronoTime(absl::InfinitePast()));
    server_->Wait();
    streams_.reset();
  }

  absl::StatusOr<bool> Take(const AppendMessage& message, AppendChunksResponse& response) {
    if (message.request.run() == "wrong") return absl::NotFoundError("wrong run");
    if (message.request.run() == "until gone") {
      waiting_.Notify();
      while (!message.gone) std::this_thread::yield();
      return absl::CancelledError("gone");
    }
    absl::MutexLock lock(&mu_);
    threads_.insert(std::this_thread::get_id());
    if (!message.request.has_chunk()) {
      ++silent_;
      return false;
    }
    const int64_t episode = message.request.chunk().episode_id();
    if (episode == 0) mu_.Await(absl::Condition(&open_));
    response.set_episode_id(episode);
    response.set_first_row(message.request.chunk().first_row());
    taken_.emplace_back(episode, response.first_row());
    return true;
  }
  absl::Status End() {
    absl::MutexLock lock(&mu_);
    ++ended_;
    return absl::OkStatus();
  }
  static AppendChunksRequest Message(int64_t episode, int64_t row) {
    AppendChunksRequest request;
    request.mutable_chunk()->set_episode_id(episode);
    request.mutable_chunk()->set_first_row(row);
    return request;
  }
  struct Call {
    grpc::ClientContext context;
    std::unique_ptr<ClientStream> stream;
  };
  std::unique_ptr<Call> Open() {
    auto call = std::make_unique<Call>();
    call->context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
    call->stream = stub_->AppendChunks(&call->context);
    return call;
  }
  static absl::Status Finish(Call& call) {
    call.stream->WritesDone();
    return FromGrpc(call.stream->Finish());
  }

  absl::Mutex mu_;
  bool open_ ABSL_GUARDED_BY(mu_) = false;  // for episode 0
  std::set<std::thread::id> threads_ ABSL_GUARDED_BY(mu_);
  std::vector<std::pair<int64_t, int64_t>> taken_ ABSL_GUARDED_BY(mu_);
  int silent_ ABSL_GUARDED_BY(mu_) = 0;
  int ended_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Notification waiting_;
  std::optional<AppendStreams> streams_;
  std::optional<Service> service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<replay::v1::ReplayService::Stub> stub_;
};

TEST_F(AppendStreamsTest, ServesManyStreamsOnAFewThreadsEachInItsOrder) {
  constexpr int kStreams = 200, kMessages = 5, kThreads = 3;
  Start(kThreads);
  std::vector<std::unique_ptr<Call>> calls(kStreams);
  for (std::unique_ptr<Call>& call : calls) call = Open();
  for (int m = 0; m < kMessages; ++m) {
    // All are sent before an answer is read.
    for (int i = 0; i < kStreams; ++i) ASSERT_TRUE(calls[i]->stream->Write(Message(1 + i, m)));
    for (int i = 0; i < kStreams; ++i) {
      AppendChunksResponse response;
      ASSERT_TRUE(calls[i]->stream->Read(&response));
      EXPECT_EQ(response.episode_id(), 1 + i);
      EXPECT_EQ(response.first_row(), m);
    }
  }
  for (const std::unique_ptr<Call>& call : calls) EXPECT_OK(Finish(*call));
  absl::MutexLock lock(&mu_);
  EXPECT_LE(threads_.size(), static_cast<size_t>(kThreads));
  EXPECT_EQ(ended_, kStreams);
  std::map<int64_t, int64_t> next;
  for (const auto& [episode, row] : taken_) EXPECT_EQ(row, next[episode]++);
}

TEST_F(AppendStreamsTest, AStreamThatSendsNothingHoldsNoThread) {
  Start(1);
  const auto silent = Open();
  AppendChunksRequest news;
  ASSERT_TRUE(silent->stream->Write(news));
  const auto other = Open();
  ASSERT_TRUE(other->stream->Write(Message(7, 0)));
  AppendChunksResponse response;
  EXPECT_TRUE(other->stream->Read(&response));
  EXPECT_OK(Finish(*other));
  EXPECT_OK(Finish(*silent));
  absl::MutexLock lock(&mu_);
  EXPECT_EQ(silent_, 1);
  EXPECT_EQ(ended_, 2);
}

TEST_F(AppendStreamsTest, ServesOthersWhileOneHandlerWaits) {
  Start(2);
  const auto waiting = Open(), other = Open();
  ASSERT_TRUE(waiting->stream->Write(Message(0, 0)));
  ASSERT_TRUE(other->stream->Write(Message(1, 0)));
  AppendChunksResponse response;
  EXPECT_TRUE(other->stream->Read(&response));
  EXPECT_EQ(response.episode_id(), 1);
  {
    absl::MutexLock lock(&mu_);
    open_ = true;
  }
  EXPECT_TRUE(waiting->stream->Read(&response));
  EXPECT_EQ(response.episode_id(), 0);
  EXPECT_OK(Finish(*waiting));
  EXPECT_OK(Finish(*other));
}

TEST_F(AppendStreamsTest, AnErrorEndsItsStreamAlone) {
  Start(2);
  const auto good = Open(), bad = Open();
  AppendChunksRequest wrong;
  wrong.set_run("wrong");
  ASSERT_TRUE(bad->stream->Write(wrong));
  AppendChunksResponse response;
  EXPECT_FALSE(bad->stream->Read(&response));
  EXPECT_THAT(Finish(*bad), StatusIs(absl::StatusCode::kNotFound, "wrong run"));
  ASSERT_TRUE(good->stream->Write(Message(1, 0)));
  EXPECT_TRUE(good->stream->Read(&response));
  EXPECT_OK(Finish(*good));
  absl::MutexLock lock(&mu_);
  EXPECT_EQ(ended_, 1);
}

TEST_F(AppendStreamsTest, AHandlerIsToldThatItsCallerIsGone) {
  Start(1);
  const auto call = Open();
  AppendChunksRequest message;
  message.set_run("until gone");
  ASSERT_TRUE(call->stream->Write(message));
  waiting_.WaitForNotification();
  call->context.TryCancel();
  EXPECT_THAT(Finish(*call), StatusIs(absl::StatusCode::kCancelled));
  const auto next = Open();  // the thread is free again
  ASSERT_TRUE(next->stream->Write(Message(1, 0)));
  AppendChunksResponse response;
  EXPECT_TRUE(next->stream->Read(&response));
  EXPECT_OK(Finish(*next));
}

TEST_F(AppendStreamsTest, ShutdownEndsOpenStreamsAndRefusesNewOnes) {
  Start(1);
  const auto idle = Open();
  ASSERT_TRUE(idle->stream->Write(Message(1, 0)));
  AppendChunksResponse response;
  ASSERT_TRUE(idle->stream->Read(&response));
  streams_->Shutdown();
  EXPECT_FALSE(idle->stream->Read(&response));
  EXPECT_THAT(Finish(*idle), StatusIs(absl::StatusCode::kCancelled));
  const auto late = Open();
  EXPECT_FALSE(late->stream->Read(&response));
  EXPECT_THAT(Finish(*late), StatusIs(absl::StatusCode::kUnavailable, "replay is shutting down"));
}

}  // namespace
}  // namespace orrery
