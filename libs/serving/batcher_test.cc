#include "libs/serving/batcher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// What became of a request; outlives it.
struct Fate {
  std::atomic<bool> cancelled = false;
  std::optional<absl::Status> failed;
};

class FakeRequest : public BatchRequest {
 public:
  FakeRequest(std::string name, Fate* fate) : name_(std::move(name)), fate_(fate) {}
  bool cancelled() const override { return fate_->cancelled; }
  void Fail(const absl::Status& status) override {
    ASSERT_FALSE(fate_->failed.has_value()) << name_ << " failed twice";
    fate_->failed = status;
  }
  const std::string& name() const { return name_; }

 private:
  const std::string name_;
  Fate* const fate_;
};

// A batcher on a clock that stands still, with an engine that writes down what it was given.
class BatcherTest : public ::testing::Test {
 protected:
  void Make(int64_t max_batch, int64_t max_queue = 100) {
    Batcher::Options options;
    options.max_batch = max_batch;
    options.max_delay = absl::Milliseconds(5);
    options.max_queue = max_queue;
    options.registry = registry_;
    options.clock = &clock_;
    batcher_ = std::make_unique<Batcher>(options, [this](Batcher::Batch batch) {
      std::vector<std::string> names;
      for (const auto& request : batch) names.push_back(static_cast<const FakeRequest&>(*request).name());
      batches_.push_back(names);
      if (while_busy_) std::exchange(while_busy_, nullptr)();
    });
  }

  Fate* Send(const std::string& client, int64_t slots = 1, bool urgent = false,
             absl::Time deadline = absl::InfiniteFuture()) {
    fates_.push_back(std::make_unique<Fate>());
    auto request = std::make_unique<FakeRequest>(client, fates_.back().get());
    request->client_id = client;
    request->slots = slots;
    request->urgent = urgent;
    request->deadline = deadline;
    batcher_->Enqueue(std::move(request));
    return fates_.back().get();
  }

  // Makes the batcher know a client that is busy elsewhere, so that "everyone waits" does not fire.
  void MeetAbsentClient() {
    Send("absent");
    ASSERT_TRUE(batcher_->TryStep());
    batches_.clear();
  }

  double GaugeValue(const std::string& name) {
    for (const auto& family : registry_->Collect()) {
      if (family.name == name) return family.metric.at(0).gauge.value;
    }
    return -1;
  }

  FakeClock clock_{absl::FromUnixSeconds(1000)};
  std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  std::function<void()> while_busy_;
  std::vector<std::unique_ptr<Fate>> fates_;
  std::vector<std::vector<std::string>> batches_;
  std::unique_ptr<Batcher> batcher_;
};

TEST_F(BatcherTest, FiresWhenFull) {
  Make(3);
  MeetAbsentClient();
  Send("a");
  Send("b");
  EXPECT_FALSE(batcher_->TryStep());
  Send("c");
  Send("d");
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_THAT(batches_, ElementsAre(ElementsAre("a", "b", "c")));
  EXPECT_FALSE(batcher_->TryStep()) << "d has company to wait for";
}

TEST_F(BatcherTest, FiresWhenTheOldestHasWaited) {
  Make(8);
  MeetAbsentClient();
  Send("a");
  clock_.Advance(absl::Milliseconds(4));
  Send("b");
  EXPECT_FALSE(batcher_->TryStep());
  clock_.Advance(absl::Milliseconds(1));
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_THAT(batches_, ElementsAre(ElementsAre("a", "b")));
}

TEST_F(BatcherTest, FiresAtOnceWhenEveryClientWaits) {
  Make(8);
  Send("a");
  Send("b");
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_THAT(batches_, ElementsAre(ElementsAre("a", "b")));
  Send("b");
  Send("b");
  EXPECT_FALSE(batcher_->TryStep()) << "a was answered just now and may come back";
  Send("a");
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_THAT(batches_.back(), ElementsAre("b", "b", "a"));
}

TEST_F(BatcherTest, ForgetsAClientThatWasAwayForASecond) {
  Make(8);
  MeetAbsentClient();
  clock_.Advance(absl::Milliseconds(1000));
  Send("a");
  EXPECT_FALSE(batcher_->TryStep());
  clock_.Advance(absl::Milliseconds(1));
  EXPECT_TRUE(batcher_->TryStep());
}

// Whatever they call themselves.
TEST_F(BatcherTest, ForgetsClientsAlsoWhileEveryBatchIsFull) {
  Make(/*max_batch=*/2);
  for (int i = 0; i < 100; ++i) {
    Send(absl::StrCat("client", i), /*slots=*/2);
    ASSERT_TRUE(batcher_->TryStep());
    EXPECT_LE(batcher_->known_clients(), 2u) << "the one answered now and the one before";
    clock_.Advance(absl::Milliseconds(600));
  }
  clock_.Advance(absl::Seconds(1));
  EXPECT_FALSE(batcher_->TryStep());
  EXPECT_EQ(batcher_->known_clients(), 0u);
}

TEST_F(BatcherTest, ForgetsClientsWhoseRequestsAllDie) {
  Make(/*max_batch=*/2);
  for (int i = 0; i < 100; ++i) {
    Send(absl::StrCat("client", i), 1, false, /*deadline=*/clock_.Now());
    EXPECT_FALSE(batcher_->TryStep());
    EXPECT_LE(batcher_->known_clients(), 2u);
    clock_.Advance(absl::Milliseconds(600));
  }
}

TEST_F(BatcherTest, GrowsWhileTheEngineIsBusy) {
  Make(8);
  MeetAbsentClient();
  Send("a");
  clock_.Advance(absl::Milliseconds(5));
  while_busy_ = [this] {
    for (const char* client : {"b", "c", "d"}) {
      Send(client);
      clock_.Advance(absl::Milliseconds(100));
    }
  };
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_FALSE(batcher_->TryStep()) << "the engine became free just now: a may come back within max_delay";
  Send("a");
  clock_.Advance(absl::Milliseconds(5));
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_THAT(batches_, ElementsAre(ElementsAre("a"), ElementsAre("b", "c", "d", "a")));
}

TEST_F(BatcherTest, KeepsClientsOfALongBatchInMind) {
  Make(8);
  Send("a");
  while_busy_ = [this] {
    clock_.Advance(absl::Seconds(10));
    Send("b");
  };
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_FALSE(batcher_->TryStep()) << "a was answered just now";
  Send("a");
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_THAT(batches_.back(), ElementsAre("b", "a"));
}

TEST_F(BatcherTest, TakesUrgentRequestsFirst) {
  Make(2);
  MeetAbsentClient();
  Send("a");
  Send("b");
  Send("evaluation", 1, /*urgent=*/true);
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_THAT(batches_, ElementsAre(ElementsAre("evaluation", "a")));
}

TEST_F(BatcherTest, NeverSplitsARequestNorPassesOneThatDoesNotFit) {
  Make(4);
  MeetAbsentClient();
  Send("a", 3);
  Send("b", 3);
  Send("c", 1);
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_THAT(batches_, ElementsAre(ElementsAre("a"), ElementsAre("b", "c")));
}

TEST_F(BatcherTest, RunsARequestLargerThanABatchAlone) {
  Make(4, /*max_queue=*/4);
  MeetAbsentClient();
  Fate* large = Send("large", 100);
  Fate* other = Send("other");
  EXPECT_FALSE(large->failed.has_value()) << "an empty queue takes any request";
  ASSERT_TRUE(other->failed.has_value());
  EXPECT_THAT(*other->failed, StatusIs(absl::StatusCode::kResourceExhausted));
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_THAT(batches_, ElementsAre(ElementsAre("large")));
}

TEST_F(BatcherTest, RefusesWhatDoesNotFitIntoTheQueue) {
  Make(4, /*max_queue=*/5);
  MeetAbsentClient();
  Send("a", 3);
  EXPECT_EQ(GaugeValue("orrery_planner_queue_depth"), 3);
  Fate* full = Send("b", 3);
  ASSERT_TRUE(full->failed.has_value());
  EXPECT_THAT(*full->failed, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("3 slots wait and 3 came, expected at most 5")));
  EXPECT_FALSE(Send("c", 2)->failed.has_value());
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_TRUE(batcher_->TryStep() || (clock_.Advance(absl::Milliseconds(5)), batcher_->TryStep()));
  EXPECT_THAT(batches_, ElementsAre(ElementsAre("a"), ElementsAre("c")));
  EXPECT_EQ(GaugeValue("orrery_planner_queue_depth"), 0);
}

TEST_F(BatcherTest, AnUrgentRequestTakesThePlacesOfTheLastUsualOnes) {
  Make(8, /*max_queue=*/8);
  MeetAbsentClient();
  Fate* first = Send("a", 3);
  Fate* second = Send("b", 3);
  Fate* third = Send("c", 2);
  EXPECT_FALSE(Send("evaluation", 4, /*urgent=*/true)->failed.has_value());
  EXPECT_FALSE(first->failed.has_value());
  for (Fate* fate : {second, third}) {
    ASSERT_TRUE(fate->failed.has_value());
    EXPECT_THAT(*fate->failed, StatusIs(absl::StatusCode::kResourceExhausted));
  }
  EXPECT_EQ(GaugeValue("orrery_planner_queue_depth"), 7);
  Fate* other = Send("another evaluation", 5, /*urgent=*/true);
  ASSERT_TRUE(other->failed.has_value()) << "urgent requests do not displace each other";
  EXPECT_THAT(*other->failed, StatusIs(absl::StatusCode::kResourceExhausted));
  EXPECT_FALSE(first->failed.has_value()) << "its place would not have been enough";
  clock_.Advance(absl::Milliseconds(5));
  EXPECT_TRUE(batcher_->TryStep());
  EXPECT_THAT(batches_, ElementsAre(ElementsAre("evaluation", "a")));
}

// Clients that come at even intervals, each once, also while the engine computes; every seventh is urgent.
class BatcherUnderLoadTest : public BatcherTest {
 protected:
  static constexpr int kBatch = 4, kBatches = 100;
  static constexpr absl::Duration kTick = absl::Microseconds(125);  // a part of all that takes time here
  static constexpr absl::Duration kCompute = absl::Milliseconds(10), kDelay = absl::Milliseconds(3);

  // `load`: slots that come, in parts of what the engine can compute; requests of 1 to `most_slots`.
  void Play(double load, int64_t most_slots) {
    batcher_.reset();  // fails what still waits there
    served_.clear();
    sent_.clear();
    fates_.clear();
    interval_ = kCompute / (load * kBatch) * (static_cast<double>(1 + most_slots) / 2);
    most_slots_ = most_slots;
    next_ = clock_.Now();
    Batcher::Options options;
    options.max_batch = options.max_queue = kBatch;
    options.max_delay = kDelay;
    options.registry = std::make_shared<prometheus::Registry>();
    options.clock = &clock_;
    batcher_ = std::make_unique<Batcher>(options, [this](Batcher::Batch batch) {
      Pass(kCompute);
      for (const auto& request : batch) {
        served_.push_back(clock_.Now() - sent_.at(static_cast<const FakeRequest&>(*request).name()));
      }
    });
    for (int i = 0; i < kBatches;) {
      if (batcher_->TryStep()) {
        ++i;
      } else {
        Pass(kTick);
      }
    }
  }
  // How many were refused; nothing else may have gone wrong.
  size_t Refused() const {
    size_t refused = 0;
    for (const auto& fate : fates_) {
      if (!fate->failed.has_value()) continue;
      EXPECT_THAT(*fate->failed, StatusIs(absl::StatusCode::kResourceExhausted));
      ++refused;
    }
    return refused;
  }

  std::map<std::string, absl::Time> sent_;
  std::vector<absl::Duration> served_;  // what each answer took

 private:
  void Pass(absl::Duration duration) {
    for (const absl::Time end = clock_.Now() + duration; clock_.Now() < end; clock_.Advance(kTick)) {
      for (; next_ <= clock_.Now(); next_ += interval_) {
        const size_t n = sent_.size();
        const std::string name = absl::StrCat("client", n);
        sent_[name] = clock_.Now();
        Send(name, 1 + static_cast<int64_t>(n) % most_slots_, /*urgent=*/n % 7 == 6);
      }
    }
  }

  absl::Duration interval_;
  int64_t most_slots_ = 1;
  absl::Time next_;
};

TEST_F(BatcherUnderLoadTest, ShortQueuesBoundTheLatencyWhateverTheLoad) {
  for (const double load : {0.5, 1.0, 2.0, 20.0}) {
    for (const int64_t most_slots : {1, 3}) {
      Play(load, most_slots);
      const std::string what = absl::StrCat("load ", load, ", up to ", most_slots, " slots");
      EXPECT_LE(*std::max_element(served_.begin(), served_.end()), kDelay + 2 * kCompute) << what;
      EXPECT_LE(sent_.size() - served_.size() - Refused(), static_cast<size_t>(kBatch)) << what << ": these still wait";
      if (most_slots > 1) continue;
      if (load < 1) {
        EXPECT_EQ(Refused(), 0u);
      } else if (load > 1) {
        EXPECT_EQ(served_.size(), 1u + kBatch * (kBatches - 1)) << what << ": all but the first batch are full";
      }
    }
  }
}

TEST_F(BatcherTest, MakesRoomByDroppingTheDead) {
  Make(4, /*max_queue=*/4);
  Fate* dead = Send("a", 4);
  dead->cancelled = true;
  EXPECT_FALSE(Send("b", 4)->failed.has_value());
  ASSERT_TRUE(dead->failed.has_value());
  EXPECT_THAT(*dead->failed, StatusIs(absl::StatusCode::kCancelled));
}

TEST_F(BatcherTest, DropsTheExpiredAndTheCancelledBeforeCompute) {
  Make(8);
  Fate* expired = Send("a", 1, false, clock_.Now() + absl::Milliseconds(3));
  Fate* cancelled = Send("b");
  Fate* good = Send("c", 1, false, clock_.Now() + absl::Milliseconds(4));
  cancelled->cancelled = true;
  clock_.Advance(absl::Milliseconds(3));
  // c waits for a and b, which are known and were dropped.
  EXPECT_FALSE(batcher_->TryStep());
  ASSERT_TRUE(expired->failed.has_value());
  EXPECT_THAT(*expired->failed, StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("3ms")));
  ASSERT_TRUE(cancelled->failed.has_value());
  EXPECT_THAT(*cancelled->failed, StatusIs(absl::StatusCode::kCancelled));
  EXPECT_FALSE(good->failed.has_value());
  clock_.Advance(absl::Milliseconds(2));
  EXPECT_FALSE(batcher_->TryStep());
  ASSERT_TRUE(good->failed.has_value());
  EXPECT_THAT(*good->failed, StatusIs(absl::StatusCode::kDeadlineExceeded));
  EXPECT_THAT(batches_, IsEmpty());
}

TEST_F(BatcherTest, CloseFailsAllThatWaitAndAllThatComeLater) {
  Make(8);
  MeetAbsentClient();
  Fate* waiting = Send("a");
  Fate* urgent = Send("b", 1, true);
  batcher_->Close();
  Fate* late = Send("c");
  for (Fate* fate : {waiting, urgent, late}) {
    ASSERT_TRUE(fate->failed.has_value());
    EXPECT_THAT(*fate->failed, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("shutting down")));
  }
  EXPECT_FALSE(batcher_->TryStep());
  EXPECT_FALSE(batcher_->Step());
  EXPECT_THAT(batches_, IsEmpty());
}

TEST_F(BatcherTest, StepWaitsOnTheClockAndCloseWakesIt) {
  Make(8);
  MeetAbsentClient();
  Send("a");
  absl::Notification ran;
  while_busy_ = [&ran] { ran.Notify(); };
  std::thread worker([this] {
    while (batcher_->Step()) {
    }
  });
  clock_.AwaitWaiters(1);
  EXPECT_FALSE(ran.HasBeenNotified());
  clock_.Advance(absl::Milliseconds(5));
  ran.WaitForNotification();
  clock_.AwaitWaiters(1);
  batcher_->Close();
  worker.join();
  EXPECT_THAT(batches_, ElementsAre(ElementsAre("a")));
}

TEST_F(BatcherTest, StepWakesForADeadline) {
  Make(8);
  MeetAbsentClient();
  absl::Notification failed;
  class Notifying : public BatchRequest {
   public:
    explicit Notifying(absl::Notification* n) : n_(n) {}
    bool cancelled() const override { return false; }
    void Fail(const absl::Status&) override { n_->Notify(); }

   private:
    absl::Notification* const n_;
  };
  auto request = std::make_unique<Notifying>(&failed);
  request->client_id = "a";
  request->deadline = clock_.Now() + absl::Milliseconds(2);
  batcher_->Enqueue(std::move(request));
  std::thread worker([this] {
    while (batcher_->Step()) {
    }
  });
  clock_.AwaitWaiters(1);
  clock_.Advance(absl::Milliseconds(2));
  failed.WaitForNotification();
  batcher_->Close();
  worker.join();
  EXPECT_THAT(batches_, IsEmpty());
}

TEST_F(BatcherTest, EveryRequestOfManyThreadsIsAnsweredOnce) {
  std::atomic<int> ran = 0;
  std::atomic<int> failed = 0;
  class Counted : public BatchRequest {
   public:
    explicit Counted(std::atomic<int>* f) : failed_(f) {}
    bool cancelled() const override { return false; }
    void Fail(const absl::Status&) override { ++*failed_; }

   private:
    std::atomic<int>* const failed_;
  };
  Batcher::Options options;
  options.max_delay = absl::Microseconds(50);
  options.max_queue = 20;
  options.registry = registry_;
  Batcher batcher(options, [&ran](Batcher::Batch batch) { ran += static_cast<int>(batch.size()); });
  std::thread worker([&batcher] {
    while (batcher.Step()) {
    }
  });
  std::vector<std::thread> clients;
  for (int c = 0; c < 4; ++c) {
    clients.emplace_back([&, c] {
      for (int i = 0; i < 500; ++i) {
        auto request = std::make_unique<Counted>(&failed);
        request->client_id = absl::StrCat("client", c);
        request->slots = 1 + i % 5;
        batcher.Enqueue(std::move(request));
      }
    });
  }
  for (std::thread& client : clients) client.join();
  while (ran == 0) std::this_thread::yield();  // the queue is not empty: the worker only has to be scheduled
  batcher.Close();
  worker.join();
  EXPECT_EQ(ran + failed, 2000);
}

}  // namespace
}  // namespace orrery
