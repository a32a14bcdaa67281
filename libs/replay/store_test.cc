#include "libs/replay/store.h"

#include <atomic>

#include "libs/base/testing.h"
#include "libs/replay/memory_store.h"
#include "libs/replay/store_conformance.h"
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
};

class FilePlace : public StorePlace {
 public:
  absl::StatusOr<std::unique_ptr<Store>> Open(int change_log_length) override {
    return OpenStore({.location = "file:" + folder_.path(), .run = "run", .change_log_length = change_log_length});
  }

 private:
  TempDir folder_;
};

// One server for all tests, each with a run of its own.
class RedisPlace : public StorePlace {
 public:
  absl::StatusOr<std::unique_ptr<Store>> Open(int change_log_length) override {
    struct Shared {
      TempDir folder;
      absl::StatusOr<std::unique_ptr<RedisServer>> server = RedisServer::Start(folder.path());
    };
    static Shared shared;
    if (!shared.server.ok()) return shared.server.status();
    return OpenStore({.location = (*shared.server)->url(), .run = run_, .partitions = 2, .change_log_length = change_log_length});
  }

 private:
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
                                           Kind<RedisPlace>("Redis", true, true)),
                         [](const auto& kind) { return kind.param.name; });

TEST(OpenStore, NamesALocationThatItDoesNotKnow) {
  const auto open = [](const std::string& location, const std::string& run = "run") {
    return OpenStore({.location = location, .run = run}).status();
  };
  EXPECT_OK(open("memory:"));
  EXPECT_THAT(open("disk:/tmp"), StatusIs(absl::StatusCode::kInvalidArgument,
                                          ::testing::HasSubstr("'disk:/tmp', expected memory:, file:FOLDER or redis://")));
  EXPECT_THAT(open("file:"), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(open("rediss://me:secret@host:1"),
              StatusIs(absl::StatusCode::kInvalidArgument, ::testing::Not(::testing::HasSubstr("secret"))));
  for (const char* location : {"redis://", "redis://host", "redis://host:0", "redis://host:99999", "redis://:6379",
                               "redis://secret@host:1", "redis://u:secret%2@host:1", "redis://[::1:1"}) {
    EXPECT_THAT(open(location), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::Not(::testing::HasSubstr("secret"))))
        << location;
  }
  for (const char* run : {"", "..", "a/b", "a{b"}) {
    EXPECT_THAT(open("memory:", run), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::HasSubstr("name of the run")));
  }
}

}  // namespace
}  // namespace orrery
