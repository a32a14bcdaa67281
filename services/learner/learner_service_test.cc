#include "services/learner/learner_service_impl.h"

#include <memory>
#include <string>

#include "libs/base/status_matchers.h"
#include "libs/client/chunk_proto.h"
#include "libs/client/status.h"
#include "libs/telemetry/service_host.h"

namespace orrery {
namespace {

using learner::v1::LearnerService;
using learner::v1::SubscribeSnapshotsRequest;
using learner::v1::SubscribeSnapshotsResponse;
using ::testing::HasSubstr;

constexpr size_t kFileBytes = 3 * kSnapshotPartBytes + 17;

std::string FileOf(int64_t counter) { return std::string(kFileBytes, static_cast<char>('a' + counter)); }

// One planner's side of a subscription.
class Planner {
 public:
  explicit Planner(LearnerService::Stub& stub) : stream_(stub.SubscribeSnapshots(&context_)) {}
  ~Planner() { context_.TryCancel(); }
  bool Send(const std::string& run, const std::string& id, SnapshotVersion serving) {
    SubscribeSnapshotsRequest request;
    request.set_run(run);
    request.set_planner_id(id);
    if (serving != SnapshotVersion{}) *request.mutable_serving_version() = ToProto(serving);
    return stream_->Write(request);
  }
  // The next whole snapshot, put together and checked.
  absl::StatusOr<Store::Snapshot> Receive() {
    SnapshotAssembler assembler;
    SubscribeSnapshotsResponse response;
    while (stream_->Read(&response)) {
      EXPECT_LE(response.part().data().size(), static_cast<size_t>(kSnapshotPartBytes));
      const absl::StatusOr<bool> complete = assembler.Add(response.part());
      if (!complete.ok()) return complete.status();
      if (*complete) return assembler.Take();
    }
    return absl::UnavailableError("the stream ended");
  }
  absl::Status Finish() { return FromGrpc(stream_->Finish()); }
  void WritesDone() { stream_->WritesDone(); }

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<SubscribeSnapshotsRequest, SubscribeSnapshotsResponse>> stream_;
};

class LearnerServiceTest : public ::testing::Test {
 protected:
  LearnerServiceTest() : service_("test", &publisher_, [] { return LearnerServiceImpl::Progress{7, 0.5}; }) {
    HostOptions options;
    options.name = "learner";
    options.services = {&service_};
    options.registry = std::make_shared<prometheus::Registry>();
    host_ = ServiceHost::Start(std::move(options)).value();
    stub_ = LearnerService::NewStub(host_->InProcessChannel());
  }
  ~LearnerServiceTest() override {
    publisher_.Close();
    host_->Shutdown(absl::Seconds(5));
  }

  SnapshotPublisher publisher_;
  LearnerServiceImpl service_;
  std::unique_ptr<ServiceHost> host_;
  std::unique_ptr<LearnerService::Stub> stub_;
};

TEST_F(LearnerServiceTest, PushesSnapshotsInPartsAndHearsWhatIsServed) {
  publisher_.Publish({1, 0}, FileOf(0));
  Planner planner(*stub_);
  ASSERT_TRUE(planner.Send("test", "planner-1", {}));
  ASSERT_OK_AND_ASSIGN(Store::Snapshot snapshot, planner.Receive());
  EXPECT_EQ(snapshot.version, (SnapshotVersion{1, 0}));
  EXPECT_TRUE(snapshot.file == FileOf(0));
  EXPECT_FALSE(publisher_.AwaitAcknowledgements({1, 0}, absl::Now()));
  ASSERT_TRUE(planner.Send("test", "planner-1", {1, 0}));
  EXPECT_TRUE(publisher_.AwaitAcknowledgements({1, 0}, absl::Now() + absl::Seconds(30)));
  publisher_.Publish({1, 1}, FileOf(1));
  ASSERT_OK_AND_ASSIGN(snapshot, planner.Receive());
  EXPECT_EQ(snapshot.version, (SnapshotVersion{1, 1}));
}

TEST_F(LearnerServiceTest, ASlowReaderSkipsToTheNewestAndHoldsNobodyUp) {
  publisher_.Publish({1, 0}, FileOf(0));
  Planner slow(*stub_);
  ASSERT_TRUE(slow.Send("test", "slow", {}));
  ASSERT_OK(slow.Receive());  // and then reads no more for a while
  Planner quick(*stub_);
  ASSERT_TRUE(quick.Send("test", "quick", {}));
  ASSERT_OK(quick.Receive());
  for (int64_t counter = 1; counter <= 5; ++counter) {
    publisher_.Publish({1, counter}, FileOf(counter));
    ASSERT_OK_AND_ASSIGN(const Store::Snapshot snapshot, quick.Receive());
    EXPECT_EQ(snapshot.version.counter, counter);
  }
  ASSERT_OK_AND_ASSIGN(Store::Snapshot snapshot, slow.Receive());
  EXPECT_EQ(snapshot.version.counter, 1);  // had begun already
  EXPECT_TRUE(snapshot.file == FileOf(1));
  ASSERT_OK_AND_ASSIGN(snapshot, slow.Receive());
  EXPECT_EQ(snapshot.version.counter, 5);
  EXPECT_TRUE(snapshot.file == FileOf(5));
}

TEST_F(LearnerServiceTest, SendsNothingThatIsServedAlready) {
  publisher_.Publish({1, 3}, FileOf(3));
  Planner planner(*stub_);
  ASSERT_TRUE(planner.Send("test", "planner-1", {1, 3}));
  publisher_.Publish({1, 4}, FileOf(4));
  ASSERT_OK_AND_ASSIGN(const Store::Snapshot snapshot, planner.Receive());
  EXPECT_EQ(snapshot.version.counter, 4);
}

TEST_F(LearnerServiceTest, RefusesWrongSubscriptions) {
  const auto subscribe = [&](const std::string& run, const std::string& id, SnapshotVersion serving) {
    Planner planner(*stub_);
    planner.Send(run, id, serving);
    return planner.Finish();
  };
  EXPECT_THAT(subscribe("other", "p", {}), StatusIs(absl::StatusCode::kNotFound, HasSubstr("\"test\"")));
  EXPECT_THAT(subscribe("", "p", {}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("run")));
  EXPECT_THAT(subscribe("test", "", {}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("planner_id")));
  EXPECT_THAT(subscribe("test", std::string(129, 'x'), {}), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(subscribe("test", "p", {-1, 0}), StatusIs(absl::StatusCode::kInvalidArgument));
  Planner changes(*stub_);
  ASSERT_TRUE(changes.Send("test", "p", {}));
  changes.Send("test", "q", {});
  EXPECT_THAT(changes.Finish(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("changed")));
}

TEST_F(LearnerServiceTest, EndsSubscriptionsWhenThePublisherCloses) {
  publisher_.Publish({1, 0}, FileOf(0));
  Planner planner(*stub_);
  ASSERT_TRUE(planner.Send("test", "planner-1", {}));
  ASSERT_OK(planner.Receive());
  publisher_.Close();
  EXPECT_THAT(planner.Receive(), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_THAT(planner.Finish(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("going away")));
}

TEST_F(LearnerServiceTest, APlannerThatLeavesIsNotWaitedFor) {
  publisher_.Publish({1, 0}, FileOf(0));
  {
    Planner planner(*stub_);
    ASSERT_TRUE(planner.Send("test", "planner-1", {}));
    ASSERT_OK(planner.Receive());
    planner.WritesDone();
    EXPECT_OK(planner.Finish());
  }
  EXPECT_TRUE(publisher_.AwaitAcknowledgements({1, 9}, absl::Now() + absl::Seconds(30)));
}

TEST_F(LearnerServiceTest, TellsProgress) {
  const auto status = [&] {
    grpc::ClientContext context;
    learner::v1::GetStatusResponse response;
    EXPECT_OK(FromGrpc(stub_->GetStatus(&context, {}, &response)));
    return response;
  };
  EXPECT_FALSE(status().has_snapshot_version());
  publisher_.Publish({2, 7}, FileOf(0));
  const learner::v1::GetStatusResponse response = status();
  EXPECT_EQ(response.run(), "test");
  EXPECT_EQ(response.updates(), 7);
  EXPECT_EQ(response.loss(), 0.5);
  EXPECT_EQ(response.snapshot_version().generation(), 2);
  EXPECT_EQ(response.snapshot_version().counter(), 7);
  EXPECT_EQ(response.subscribers(), 0);
}

}  // namespace
}  // namespace orrery
