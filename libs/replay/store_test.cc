#include "libs/replay/store.h"

#include <atomic>
#include <type_traits>

#include "libs/base/status.h"
#include "libs/base/testing.h"
#include "libs/replay/memory_store.h"
#include "libs/replay/store_conformance.h"
#include "libs/replay/testing/redis_cluster.h"
#include "libs/replay/testing/redis_server.h"

namespace orrery {
namespace {

class MemoryPlace : public StorePlace {
 public:
  absl::StatusOr<std::unique_ptr<Store>> Open(int change_log_length) override {
    StoreOptions options;
    options.change_log_length = change_log_length;
    return MakeMemoryStore(options);
  }
  StoreOptions Options() override { return {.location = "memory:", .run = "run"}; }
};

class FilePlace : public StorePlace {
 public:
  absl::StatusOr<std::unique_ptr<Store>> Open(int change_log_length) override {
    StoreOptions options = Options();
    options.change_log_length = change_log_length;
    return OpenStore(options);
  }
  StoreOptions Options() override { return {.location = "file:" + folder_.path(), .run = "run"}; }

 private:
  TempDir folder_;
};

// One Redis or one cluster for all tests, each with a run of its own. The partitions of a run lie on any nodes.
template <typename Server>
class RedisPlace : public StorePlace {
 public:
  absl::StatusOr<std::unique_ptr<Store>> Open(int change_log_length) override {
    RETURN_IF_ERROR(Shared().server.status());
    StoreOptions options = Options();
    options.change_log_length = change_log_length;
    return OpenStore(options);
  }
  StoreOptions Options() override {
    return {.location = (*Shared().server)->url(), .run = run_, .partitions = 2, .timeout = absl::Seconds(20)};
  }

 private:
  struct Place {
    TempDir folder;
    absl::StatusOr<std::unique_ptr<Server>> server = Start(folder.path());
  };
  static absl::StatusOr<std::unique_ptr<Server>> Start(const std::string& folder) {
    if constexpr (std::is_same_v<Server, RedisCluster>) {
      return RedisCluster::Start(folder, {.password = "secret"});
    } else {
      return RedisServer::Start(folder);
    }
  }
  static Place& Shared() {
    static Place place;
    return place;
  }
  static std::atomic<int>& Count() {
    static std::atomic<int> count = 0;
    return count;
  }
  const std::string run_ = absl::StrCat("run-", ++Count());
};

template <typename Place>
StoreKind Kind(const std::string& name, bool lasting, bool shared) {
  return {name, [] { return std::make_unique<Place>(); }, lasting, shared};
}

INSTANTIATE_TEST_SUITE_P(Stores, StoreConformance,
                         ::testing::Values(Kind<MemoryPlace>("Memory", false, false), Kind<FilePlace>("File", true, false),
                                           Kind<RedisPlace<RedisServer>>("Redis", true, true),
                                           Kind<RedisPlace<RedisCluster>>("RedisCluster", true, true)),
                         [](const auto& kind) { return kind.param.name; });

TEST(OpenStore, NamesALocationThatItDoesNotKnow) {
  const auto open = [](const std::string& location, const std::string& run = "run") {
    return OpenStore({.location = location, .run = run}).status();
  };
  EXPECT_OK(open("memory:"));
  EXPECT_THAT(open("disk:/tmp"), StatusIs(absl::StatusCode::kInvalidArgument,
                                          ::testing::HasSubstr("'disk:/tmp', expected memory:, file:FOLDER, redis://")));
  EXPECT_THAT(open("file:"), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(open("rediss://me:secret@host:1"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       ::testing::AllOf(::testing::Not(::testing::HasSubstr("secret")), ::testing::HasSubstr("stunnel"))));
  for (const char* location : {"redis://", "redis://host", "redis://host:0", "redis://host:99999", "redis://:6379",
                               "redis://secret@host:1", "redis://u:secret%2@host:1", "redis://[::1:1", "redis://a:1,b:2",
                               "redis-cluster://", "redis-cluster://a:1,", "redis-cluster://u:secret@a:1,b",
                               "redis-cluster://u:secret@a:1,b:x"}) {
    EXPECT_THAT(open(location), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::Not(::testing::HasSubstr("secret"))))
        << location;
  }
  for (const char* run : {"", "..", "a/b", "a{b"}) {
    EXPECT_THAT(open("memory:", run), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::HasSubstr("name of the run")));
  }
}

TEST(ListDataSets, NamesALocationThatItDoesNotKnow) {
  const auto list = [](const std::string& location) { return ListDataSets(location, absl::Seconds(1)); };
  EXPECT_THAT(list("memory:"), IsOkAndHolds(::testing::IsEmpty()));
  EXPECT_THAT(list("disk:/tmp"),
              StatusIs(absl::StatusCode::kInvalidArgument, ::testing::HasSubstr("'disk:/tmp', expected memory:")));
  EXPECT_THAT(list("redis://host"), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(list("file:/does/not/exist"), StatusIs(absl::StatusCode::kNotFound, ::testing::HasSubstr("/does/not/exist")));
}

TEST(DeleteDataSet, NamesWhatItDoesNotKnow) {
  const auto remove = [](const std::string& location, const std::string& run) {
    return DeleteDataSet({.location = location, .run = run});
  };
  EXPECT_THAT(remove("disk:/tmp", "run"), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(remove("file:/tmp", ".."), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::HasSubstr("name of the run")));
  EXPECT_THAT(remove("file:/does/not/exist", "run"),
              StatusIs(absl::StatusCode::kNotFound, ::testing::HasSubstr("/does/not/exist/run")));
}

}  // namespace
}  // namespace orrery
