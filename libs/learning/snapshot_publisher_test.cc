#include "libs/learning/snapshot_publisher.h"

#include <thread>
#include <vector>

#include "libs/base/file.h"
#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

class Follower : public SnapshotPublisher::Subscriber {
 public:
  void OnSnapshot(std::shared_ptr<const PublishedSnapshot> snapshot) override { got.push_back(snapshot->version); }
  void OnClose() override { closed = true; }
  std::vector<SnapshotVersion> got;
  bool closed = false;
};

TEST(SnapshotPublisher, HandsOutTheNewestAtOnceAndThenEachNewerOne) {
  SnapshotPublisher publisher;
  EXPECT_EQ(publisher.version(), SnapshotVersion());
  publisher.Publish({1, 5}, "five");
  Follower fresh, current, newer;
  publisher.Subscribe(&fresh, {});
  publisher.Subscribe(&current, {1, 5});
  publisher.Subscribe(&newer, {1, 7});
  publisher.Publish({1, 4}, "older: ignored");
  publisher.Publish({1, 6}, "six");
  publisher.Publish({2, 0}, "next generation");
  EXPECT_EQ(fresh.got, (std::vector<SnapshotVersion>{{1, 5}, {1, 6}, {2, 0}}));
  EXPECT_EQ(current.got, (std::vector<SnapshotVersion>{{1, 6}, {2, 0}}));
  EXPECT_EQ(newer.got, (std::vector<SnapshotVersion>{{2, 0}}));
  EXPECT_EQ(publisher.version(), (SnapshotVersion{2, 0}));
  EXPECT_EQ(publisher.subscribers(), 3);
}

TEST(SnapshotPublisher, WaitsForEverySubscriberAndForNoneThatLeft) {
  FakeClock clock;
  SnapshotPublisher publisher(&clock);
  EXPECT_TRUE(publisher.AwaitAcknowledgements({1, 1}, clock.Now()));  // nobody is there
  Follower quick, slow, gone;
  for (Follower* follower : {&quick, &slow, &gone}) publisher.Subscribe(follower, {});
  publisher.Publish({1, 1}, "one");
  bool all = false;
  std::thread waiter([&] { all = publisher.AwaitAcknowledgements({1, 1}, absl::InfiniteFuture()); });
  clock.AwaitWaiters(1);
  publisher.Acknowledge(&quick, {1, 1});
  publisher.Unsubscribe(&gone);
  EXPECT_FALSE(publisher.AwaitAcknowledgements({1, 1}, clock.Now()));  // the slow one is still missing
  publisher.Acknowledge(&slow, {1, 2});
  waiter.join();
  EXPECT_TRUE(all);
}

TEST(SnapshotPublisher, StopsWaitingAtTheDeadlineAndWhenClosed) {
  FakeClock clock;
  SnapshotPublisher publisher(&clock);
  Follower stuck;
  publisher.Subscribe(&stuck, {});
  for (const bool close : {false, true}) {
    bool all = true;
    std::thread waiter([&] { all = publisher.AwaitAcknowledgements({1, 1}, clock.Now() + absl::Seconds(10)); });
    clock.AwaitWaiters(1);
    close ? publisher.Close() : clock.Advance(absl::Seconds(10));
    waiter.join();
    EXPECT_FALSE(all);
  }
  EXPECT_TRUE(stuck.closed);
  Follower late;
  publisher.Subscribe(&late, {});
  EXPECT_TRUE(late.closed);
}

}  // namespace
}  // namespace orrery
