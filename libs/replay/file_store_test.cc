#include "libs/replay/file_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "libs/base/file.h"
#include "libs/base/log.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/replay/testing/chunks.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

class FileStoreTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { ASSERT_OK(InitLogging("file_store_test", "error")); }
  std::unique_ptr<Store> Open(int64_t segment_bytes = 1 << 20) {
    auto store = TryOpen(segment_bytes);
    EXPECT_OK(store);
    return store.ok() ? *std::move(store) : nullptr;
  }
  absl::StatusOr<std::unique_ptr<Store>> TryOpen(int64_t segment_bytes = 1 << 20) {
    return OpenFileStore({.folder = folder_.path(), .segment_bytes = segment_bytes});
  }
  std::vector<std::string> Segments() const {
    std::vector<std::string> names;
    for (const auto& file : std::filesystem::directory_iterator(folder_.path())) {
      const std::string name = file.path().filename().string();
      if (name.starts_with("segment-") && name.ends_with(".log")) names.push_back(name);
    }
    std::sort(names.begin(), names.end());
    return names;
  }
  std::string Contents(const std::string& name) const { return *ReadFile(folder_ / name); }
  void Replace(const std::string& name, const std::string& contents) {
    std::ofstream(folder_ / name, std::ios::binary | std::ios::trunc) << contents;
  }
  static std::vector<ChunkKey> Live(Store& store) {
    std::vector<ChunkKey> keys;
    const auto batch = store.Changes("", 1000, absl::ZeroDuration());
    EXPECT_OK(batch);
    for (const Change& change : batch->changes) keys.push_back(change.info.key);
    return keys;
  }

  TempDir folder_;
};

// Whatever a crash leaves of the last record, what was acknowledged before it is there, and the store goes on.
TEST_F(FileStoreTest, CutsOffATornTailAtEveryByte) {
  {
    const auto store = Open();
    ASSERT_OK(store->Append(MakeChunk(1, 0)));
  }
  const size_t good = Contents("segment-000000001.log").size();
  {
    const auto store = Open();
    ASSERT_OK(store->Append(MakeChunk(2, 0)));
  }
  const std::string whole = Contents("segment-000000001.log");
  ASSERT_GT(whole.size(), good + 20);
  for (size_t size = good; size < whole.size(); ++size) {
    Replace("segment-000000001.log", whole.substr(0, size));
    const auto store = Open();
    ASSERT_NE(store, nullptr);
    ASSERT_THAT(Live(*store), ::testing::ElementsAre(ChunkKey{1, 0})) << size;
    if (size > good) {
      ASSERT_EQ(Contents("segment-000000001.log.cut"), whole.substr(good, size - good));
    }
    if (size % 16 == 0) {
      ASSERT_OK(store->Append(MakeChunk(2, 0)));
      ASSERT_EQ(Contents("segment-000000001.log"), whole);
    }
  }
  // Bytes that were never written, as a file system may leave them.
  for (size_t i = good; i < whole.size(); ++i) {
    std::string damaged = whole;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x10);
    Replace("segment-000000001.log", damaged);
    const auto store = Open();
    ASSERT_NE(store, nullptr);
    ASSERT_THAT(Live(*store), ::testing::ElementsAre(ChunkKey{1, 0})) << i;
  }
  for (const size_t size : {0, 3, 7}) {  // crashed while the file was made
    Replace("segment-000000001.log", whole.substr(0, size));
    EXPECT_TRUE(Live(*Open()).empty());
  }
}

TEST_F(FileStoreTest, NamesTheDamagedPlace) {
  {
    const auto store = Open(1);  // a segment for every record
    for (int i = 1; i <= 3; ++i) ASSERT_OK(store->Append(MakeChunk(i, 0)));
  }
  const std::string first = Contents("segment-000000001.log");
  // The header of a record in a closed segment: found at the start.
  std::string damaged = first;
  damaged[12] = 'X';
  Replace("segment-000000001.log", damaged);
  EXPECT_THAT(TryOpen(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("segment-000000001.log is damaged at byte 8")));
  // A payload: found when it is read.
  damaged = first;
  damaged.back() = 'X';
  Replace("segment-000000001.log", damaged);
  {
    const auto store = Open();
    EXPECT_THAT(store->Read({{1, 0}}), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("segment-000000001.log is damaged at byte")));
    EXPECT_OK(store->Read({{2, 0}}));
  }
  Replace("segment-000000001.log", "something else");
  EXPECT_THAT(TryOpen(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("not a segment file")));
  damaged = first;
  damaged[4] = 2;
  Replace("segment-000000001.log", damaged);
  EXPECT_THAT(TryOpen(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("another version")));
  Replace("segment-000000001.log", first);
  EXPECT_OK(TryOpen());
  Replace("format", "orrery-replay 2\n");
  EXPECT_THAT(TryOpen(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("format: this version reads 'orrery-replay 1'")));
}

TEST_F(FileStoreTest, NamesADamagedValueOrSnapshot) {
  {
    const auto store = Open();
    ASSERT_OK(store->CompareAndSet("run", 0, "the state"));
    ASSERT_OK(store->PutSnapshot({{1, 1}, "the snapshot"}));
  }
  for (const std::string name : {"value-run", "snapshot"}) {
    const std::string contents = Contents(name);
    std::string damaged = contents;
    damaged.back() = 'X';
    Replace(name, damaged);
    EXPECT_THAT(TryOpen(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(name + " is damaged")));
    Replace(name, "");
    EXPECT_THAT(TryOpen(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(name + " is damaged")));
    Replace(name, contents);
  }
  Replace("value-run.tmp.123", "an interrupted write");
  const auto store = Open();
  EXPECT_EQ(store->Get("run")->value, "the state");
  EXPECT_FALSE(std::filesystem::exists(folder_ / "value-run.tmp.123"));
}

TEST_F(FileStoreTest, DeletesSegmentsWhoseChunksAreAllEvicted) {
  const std::string payload(300, 'p');
  {
    const auto store = Open(1000);
    for (int i = 1; i <= 9; ++i) ASSERT_OK(store->Append(MakeChunk(i, 0, 10, payload)));
    ASSERT_EQ(Segments().size(), 3u);
    // The second segment's chunks alone: kept, as a later file could need its place in the order.
    ASSERT_OK(store->Evict({{4, 0}, {5, 0}, {6, 0}}));
    EXPECT_EQ(Segments().size(), 3u);
    ASSERT_OK(store->Evict({{1, 0}, {2, 0}}));
    EXPECT_EQ(Segments().size(), 3u);
  }
  {
    const auto store = Open(1000);
    EXPECT_THAT(Live(*store), ::testing::ElementsAre(ChunkKey{3, 0}, ChunkKey{7, 0}, ChunkKey{8, 0}, ChunkKey{9, 0}));
    ASSERT_OK(store->Evict({{3, 0}}));
    EXPECT_EQ(Segments().size(), 1u);
    ASSERT_OK(store->Append(MakeChunk(1, 0, 10, payload)));
    EXPECT_EQ((*store->Read({{9, 0}}))[0], MakeChunk(9, 0, 10, payload));
  }
  EXPECT_THAT(Live(*Open(1000)), ::testing::ElementsAre(ChunkKey{1, 0}, ChunkKey{7, 0}, ChunkKey{8, 0}, ChunkKey{9, 0}));
}

TEST_F(FileStoreTest, ReadsAChunkWhoseSegmentGoesAway) {
  const auto store = Open(1);
  for (int i = 1; i <= 40; ++i) ASSERT_OK(store->Append(MakeChunk(i, 0)));
  std::thread reader([&] {
    for (int i = 1; i <= 40; ++i) {
      const auto chunks = store->Read({{i, 0}});
      ASSERT_OK(chunks);
      EXPECT_EQ((*chunks)[0].value_or(MakeChunk(i, 0)), MakeChunk(i, 0));
    }
  });
  for (int i = 1; i <= 40; ++i) ASSERT_OK(store->Evict({{i, 0}}));
  reader.join();
  EXPECT_EQ(Segments().size(), 1u);
}

TEST_F(FileStoreTest, ManyThreadsFillManySegments) {
  {
    const auto store = Open(2000);
    std::vector<std::thread> threads;
    for (int t = 1; t <= 6; ++t) {
      threads.emplace_back([&store, t] {
        for (int i = 0; i < 20; ++i) EXPECT_OK(store->Append(MakeChunk(t, i * 10, 10, std::string(t * 50, 'x'))));
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  EXPECT_GT(Segments().size(), 5u);
  EXPECT_EQ(Live(*Open(2000)).size(), 120u);
}

TEST_F(FileStoreTest, IsForOneProcessAtATime) {
  const auto store = Open();
  EXPECT_THAT(TryOpen(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("open in another process")));
}

TEST_F(FileStoreTest, IsListedWithoutBeingChanged) {
  {
    ASSERT_OK_AND_ASSIGN(const auto store, OpenFileStore({.folder = folder_ / "b", .segment_bytes = 1000}));
    for (int i = 1; i <= 9; ++i) ASSERT_OK(store->Append(MakeChunk(i, 0, 10, std::string(300, 'p'))));
    ASSERT_OK(store->Evict({{1, 0}, {2, 0}}));
  }
  ASSERT_OK_AND_ASSIGN(const auto open, OpenFileStore({.folder = folder_ / "a"}));
  ASSERT_OK(open->Append(MakeChunk(1, 0)));
  std::filesystem::create_directory(folder_ / "foreign");
  Replace("file", "");
  const auto list = [&] { return ListFileDataSets(folder_.path()); };
  const DataSetSummary a{"a", 1, 7};
  EXPECT_THAT(list(), IsOkAndHolds(::testing::ElementsAre(a, DataSetSummary{"b", 7, 2100})));
  // The newest segment ends with evictions; a record that a crash left incomplete is passed over, and stays.
  const std::string newest = "b/segment-000000003.log";
  const std::string torn = Contents(newest) + "an incomplete record";
  Replace(newest, torn);
  EXPECT_THAT(list(), IsOkAndHolds(::testing::ElementsAre(a, DataSetSummary{"b", 7, 2100})));
  EXPECT_EQ(Contents(newest), torn);
  Replace(newest, "ORS");
  EXPECT_THAT(list(), IsOkAndHolds(::testing::ElementsAre(a, DataSetSummary{"b", 6, 1800})));
  // Damage before that: what was counted until then.
  std::string damaged = Contents("b/segment-000000002.log");
  damaged[12] = 'X';
  Replace("b/segment-000000002.log", damaged);
  EXPECT_THAT(list(), IsOkAndHolds(::testing::ElementsAre(a, DataSetSummary{"b", 3, 900})));
}

TEST_F(FileStoreTest, DeletesWhatItMadeAndNothingElse) {
  const auto not_there = StatusIs(absl::StatusCode::kNotFound, HasSubstr("there is no data set in " + folder_.path()));
  EXPECT_THAT(DeleteFileDataSet(folder_.path()), not_there);
  {
    const auto store = Open(1);
    for (int i = 1; i <= 3; ++i) ASSERT_OK(store->Append(MakeChunk(i, 0)));
    ASSERT_OK(store->CompareAndSet("run", 0, "state"));
    ASSERT_OK(store->PutSnapshot({{1, 1}, "file"}));
    EXPECT_THAT(DeleteFileDataSet(folder_.path()),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("open in another process")));
    EXPECT_EQ(Live(*store).size(), 3u);
  }
  Replace("notes.txt", "of a person");
  Replace("format", "orrery-replay 2\n");
  EXPECT_THAT(DeleteFileDataSet(folder_.path()), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("orrery-replay 1")));
  EXPECT_EQ(Segments().size(), 3u);
  Replace("format", "orrery-replay 1\n");
  ASSERT_OK(DeleteFileDataSet(folder_.path()));
  std::vector<std::string> left;
  for (const auto& file : std::filesystem::directory_iterator(folder_.path())) left.push_back(file.path().filename().string());
  EXPECT_THAT(left, ::testing::ElementsAre("notes.txt"));
  EXPECT_THAT(DeleteFileDataSet(folder_.path()), not_there);
  std::filesystem::remove(folder_ / "notes.txt");
  EXPECT_TRUE(Live(*Open()).empty());
  ASSERT_OK(DeleteFileDataSet(folder_.path()));
  EXPECT_FALSE(std::filesystem::exists(folder_.path()));
}

TEST_F(FileStoreTest, NamesAFolderThatCannotBe) {
  Replace("file", "");
  EXPECT_THAT(OpenFileStore({.folder = folder_ / "file/below"}).status().message(), HasSubstr("file/below"));
}

}  // namespace
}  // namespace orrery
