#include "libs/replay/redis_store.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/replay/chunk_text.h"
#include "libs/replay/redis_client.h"
#include "libs/replay/redis_slots.h"

namespace orrery {
namespace {

constexpr char kSchema[] = "1";
constexpr int kMaxPartitions = 1024;
constexpr int kMaxConnections = 10000;
// Chunks of one pipeline or script: bounds the memory of replies and the time that Redis serves nobody else.
constexpr size_t kReadBatch = 32;
constexpr size_t kEvictBatch = 256;
constexpr size_t kListBatch = 10000;
// A data set that still grows while it is deleted for the third time is in use.
constexpr int kDeletePasses = 3;
constexpr char kKeyPrefix[] = "orrery:{";
constexpr char kDataSetSuffix[] = "}:data_set";

// KEYS: data set. ARGV: schema, partitions (0: do not make it), generation.
constexpr char kOpenScript[] = R"(
if redis.call('EXISTS', KEYS[1]) == 0 and ARGV[2] ~= '0' then
  redis.call('HSET', KEYS[1], 'schema', ARGV[1], 'partitions', ARGV[2], 'generation', ARGV[3])
end
return redis.call('HMGET', KEYS[1], 'schema', 'partitions', 'generation'))";

// KEYS: chunk, live, log, sequence. ARGV: run id, info, payload, key text, length of the log.
// Returns 1 (stored), 0 (was there) or -1 (other contents).
constexpr char kAppendScript[] = R"(
local kept = redis.call('HMGET', KEYS[1], 'run_id', 'info', 'payload')
if kept[2] then
  if kept[1] == ARGV[1] and kept[2] == ARGV[2] and kept[3] == ARGV[3] then return 0 end
  return -1
end
redis.call('HSET', KEYS[1], 'run_id', ARGV[1], 'info', ARGV[2], 'payload', ARGV[3])
redis.call('ZADD', KEYS[2], 0, ARGV[4] .. ' ' .. ARGV[2])
local id = string.format('%.0f-0', redis.call('INCR', KEYS[4]))
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[5], id, 'append', ARGV[2])
return 1)";

// KEYS: live, log, sequence, chunks. ARGV: length of the log, key texts. The chunk goes first: on a full Redis a script may
// write what needs memory only after it has written something that does not.
constexpr char kEvictScript[] = R"(
for i = 4, #KEYS do
  local info = redis.call('HGET', KEYS[i], 'info')
  if info then
    redis.call('UNLINK', KEYS[i])
    local key = ARGV[i - 2]
    redis.call('ZREMRANGEBYLEX', KEYS[1], '[' .. key .. ' ', '(' .. key .. '!')
    local id = string.format('%.0f-0', redis.call('INCR', KEYS[3]))
    redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[1], id, 'evict', info)
  end
end
return 1)";

// KEYS: log, sequence. ARGV: position, count. Returns the last position and the entries after the given one, or -1 when
// some of them are gone.
constexpr char kChangesScript[] = R"(
local last = tonumber(redis.call('GET', KEYS[2]) or '0')
local at = tonumber(ARGV[1])
if at > last then return {-1, {}} end
local first = string.format('%.0f-0', at + 1)
local entries = redis.call('XRANGE', KEYS[1], first, '+', 'COUNT', ARGV[2])
if at < last and (#entries == 0 or entries[1][1] ~= first) then return {-1, {}} end
return {last, entries})";

// KEYS: value. ARGV: version and hash of the value that is known. Returns the time (seconds, microseconds), and unless the
// value is the known one, its version and itself.
constexpr char kGetUnlessKnownScript[] = R"(
local now = redis.call('TIME')
local kept = redis.call('HMGET', KEYS[1], 'version', 'hash')
if kept[1] == ARGV[1] and kept[2] == ARGV[2] then return now end
return {now[1], now[2], kept[1] or '0', redis.call('HGET', KEYS[1], 'value') or ''})";

// KEYS: value. ARGV: expected version, new version, value, its hash. Returns 1 or the version that is there.
constexpr char kCompareAndSetScript[] = R"(
local version = redis.call('HGET', KEYS[1], 'version') or '0'
if version ~= ARGV[1] then return version end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'value', ARGV[3], 'hash', ARGV[4])
return 1)";

// KEYS: snapshot. ARGV: order, generation, counter, file.
constexpr char kPutSnapshotScript[] = R"(
local kept = redis.call('HGET', KEYS[1], 'order')
if kept and kept >= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'order', ARGV[1], 'generation', ARGV[2], 'counter', ARGV[3], 'file', ARGV[4])
return 1)";

// KEYS: data set. All replicas ask the node that has this key, so that they see one clock; values are there, too.
constexpr char kTimeScript[] = "return redis.call('TIME')";

// Where a reader is: in the log of each partition, and while it still lists the live chunks, the last one listed.
struct Cursor {
  std::vector<int64_t> positions;
  std::string listed;  // key text; empty: listing is done
};

// Thread-safe (the client is, the rest is constant).
class RedisStore : public Store {
 public:
  RedisStore(const StoreOptions& options, RedisLocation location)
      : run_(options.run), log_length_(absl::StrCat(options.change_log_length)),
        client_(std::move(location), options.timeout, options.max_connections) {}

  // With 0 partitions an existing data set is opened, or it is NOT_FOUND.
  absl::Status Open(int partitions);
  absl::Status Count(DataSetSummary& summary);

  absl::Status Append(const Chunk& chunk) override;
  absl::StatusOr<std::vector<std::optional<Chunk>>> Read(absl::Span<const ChunkKey> keys) override;
  absl::StatusOr<ChangeBatch> Changes(const std::string& cursor, int max, absl::Duration wait) override;
  absl::Status Evict(absl::Span<const ChunkKey> keys) override;
  absl::StatusOr<VersionedValue> Get(const std::string& name) override;
  absl::StatusOr<TimedValue> GetUnlessKnown(const std::string& name, const ValueIdentity& known) override;
  absl::Status CompareAndSet(const std::string& name, int64_t expected_version, const std::string& value) override;
  absl::Status PutSnapshot(const Snapshot& snapshot) override;
  absl::StatusOr<Snapshot> GetSnapshot() override;
  absl::StatusOr<absl::Time> Now() override;

 private:
  int PartitionOf(const ChunkKey& key) const { return static_cast<int>(key.episode_id % partitions_); }
  std::string PartitionKey(int p, absl::string_view name) const { return absl::StrCat(kKeyPrefix, run_, ":", p, "}:", name); }
  std::string ChunkKeyName(const ChunkKey& key) const {
    return PartitionKey(PartitionOf(key), absl::StrCat("chunk:", key.episode_id, ":", key.first_row));
  }
  std::string RunKey(absl::string_view name) const { return absl::StrCat(kKeyPrefix, run_, "}:", name); }

  absl::StatusOr<std::optional<Chunk>> ToChunk(const ChunkKey& key, const RedisReply& reply) const;
  std::string CursorText(const Cursor& cursor) const;
  absl::StatusOr<Cursor> ParseCursor(const std::string& text) const;
  absl::StatusOr<std::vector<int64_t>> LastPositions();
  // Fills `batch` with live chunks after cursor.listed.
  absl::Status List(Cursor& cursor, size_t max, ChangeBatch& batch);
  // Fills `batch` from the logs.
  absl::Status Follow(Cursor& cursor, size_t max, ChangeBatch& batch);
  absl::Status AwaitChange(const Cursor& cursor, absl::Duration wait);

  const std::string run_;
  const std::string log_length_;
  RedisClient client_;
  // Constant once open.
  int partitions_ = 1;
  std::string generation_;
  std::string append_, evict_, changes_, get_unless_known_, compare_and_set_, put_snapshot_, time_;
};

absl::Status Unexpected(absl::string_view key) {
  return absl::DataLossError(absl::StrCat("Redis key ", key, " does not hold what it should (docs/replay_storage.md)"));
}

absl::Status NoDataSet(absl::string_view run) {
  return absl::NotFoundError(absl::StrCat("there is no data set '", run, "' in Redis"));
}

absl::Status CheckSchema(absl::string_view run, absl::string_view schema) {
  if (schema == kSchema) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("data set '", run, "' in Redis has schema version '", schema, "', expected ", kSchema));
}

bool IsArray(const RedisReply& reply, size_t size) {
  return reply.kind == RedisReply::Kind::kArray && reply.elements.size() == size;
}

std::string HashText(uint64_t hash) { return absl::StrFormat("%016x", hash); }

absl::Status NoTime() { return absl::DataLossError("Redis answers TIME with something else"); }

absl::StatusOr<absl::Time> ToTime(const RedisReply& seconds_reply, const RedisReply& micros_reply) {
  int64_t seconds = 0, micros = 0;
  if (!absl::SimpleAtoi(seconds_reply.text, &seconds) || !absl::SimpleAtoi(micros_reply.text, &micros)) return NoTime();
  return absl::FromUnixMicros(seconds * 1000000 + micros);
}

absl::Status RedisStore::Open(int partitions) {
  for (const auto& [source, sha] : std::vector<std::pair<const char*, std::string*>>{
           {kAppendScript, &append_}, {kEvictScript, &evict_}, {kChangesScript, &changes_},
           {kGetUnlessKnownScript, &get_unless_known_}, {kCompareAndSetScript, &compare_and_set_},
           {kPutSnapshotScript, &put_snapshot_}, {kTimeScript, &time_}}) {
    ASSIGN_OR_RETURN(*sha, client_.LoadScript(source));
  }
  const std::string key = RunKey("data_set");
  ASSIGN_OR_RETURN(const std::string open, client_.LoadScript(kOpenScript));
  ASSIGN_OR_RETURN(const RedisReply reply,
                   client_.RunOne(RedisClient::Script(open, {key}, {kSchema, absl::StrCat(partitions), RandomIdentity()})));
  if (!IsArray(reply, 3)) return Unexpected(key);
  if (partitions == 0 && reply.elements[0].kind == RedisReply::Kind::kNil) return NoDataSet(run_);
  RETURN_IF_ERROR(CheckSchema(run_, reply.elements[0].text));
  generation_ = reply.elements[2].text;
  if (!absl::SimpleAtoi(reply.elements[1].text, &partitions_) || partitions_ < 1 || partitions_ > kMaxPartitions ||
      generation_.empty()) {
    return Unexpected(key);
  }
  return absl::OkStatus();
}

absl::Status RedisStore::Append(const Chunk& chunk) {
  RETURN_IF_ERROR(CheckChunk(chunk));
  const ChunkKey& key = chunk.info.key;
  const int p = PartitionOf(key);
  ASSIGN_OR_RETURN(const RedisReply reply,
                   client_.RunOne(RedisClient::Script(
                       append_, {ChunkKeyName(key), PartitionKey(p, "live"), PartitionKey(p, "log"), PartitionKey(p, "sequence")},
                       {chunk.run_id, InfoText(chunk.info), chunk.payload, KeyText(key), log_length_})));
  return reply.integer < 0 ? OtherContents(key) : absl::OkStatus();
}

absl::StatusOr<std::optional<Chunk>> RedisStore::ToChunk(const ChunkKey& key, const RedisReply& reply) const {
  if (!IsArray(reply, 3)) return Unexpected(ChunkKeyName(key));
  if (reply.elements[1].kind == RedisReply::Kind::kNil) return std::nullopt;
  const absl::StatusOr<ChunkInfo> info = ParseInfoText(reply.elements[1].text);
  if (!info.ok() || info->key != key || info->payload_bytes != static_cast<int64_t>(reply.elements[2].text.size())) {
    return Unexpected(ChunkKeyName(key));
  }
  return Chunk{reply.elements[0].text, *info, reply.elements[2].text};
}

absl::StatusOr<std::vector<std::optional<Chunk>>> RedisStore::Read(absl::Span<const ChunkKey> keys) {
  std::vector<std::optional<Chunk>> chunks;
  for (size_t begin = 0; begin < keys.size(); begin += kReadBatch) {
    const absl::Span<const ChunkKey> part = keys.subspan(begin, kReadBatch);
    std::vector<RedisCommand> commands;
    for (const ChunkKey& key : part) commands.push_back({"HMGET", ChunkKeyName(key), "run_id", "info", "payload"});
    ASSIGN_OR_RETURN(const std::vector<RedisReply> replies, client_.Run(commands));
    for (size_t i = 0; i < part.size(); ++i) {
      ASSIGN_OR_RETURN(std::optional<Chunk> chunk, ToChunk(part[i], replies[i]));
      chunks.push_back(std::move(chunk));
    }
  }
  return chunks;
}

absl::Status RedisStore::Evict(absl::Span<const ChunkKey> keys) {
  std::map<int, std::vector<ChunkKey>> by_partition;
  for (const ChunkKey& key : keys) {
    if (key.episode_id >= 1) by_partition[PartitionOf(key)].push_back(key);
  }
  for (const auto& [p, victims] : by_partition) {
    for (size_t begin = 0; begin < victims.size(); begin += kEvictBatch) {
      std::vector<std::string> names = {PartitionKey(p, "live"), PartitionKey(p, "log"), PartitionKey(p, "sequence")};
      std::vector<std::string> arguments = {log_length_};
      for (const ChunkKey& key : absl::MakeConstSpan(victims).subspan(begin, kEvictBatch)) {
        names.push_back(ChunkKeyName(key));
        arguments.push_back(KeyText(key));
      }
      RETURN_IF_ERROR(client_.RunOne(RedisClient::Script(evict_, names, std::move(arguments))).status());
    }
  }
  return absl::OkStatus();
}

std::string RedisStore::CursorText(const Cursor& cursor) const {
  std::string text = absl::StrCat(generation_, " ", absl::StrJoin(cursor.positions, ","));
  if (!cursor.listed.empty()) absl::StrAppend(&text, " ", cursor.listed);
  return text;
}

absl::StatusOr<Cursor> RedisStore::ParseCursor(const std::string& text) const {
  const std::vector<absl::string_view> parts = absl::StrSplit(text, ' ');
  Cursor cursor;
  bool good = (parts.size() == 2 || parts.size() == 3) && parts[0] == generation_;
  if (good) {
    for (const absl::string_view number : absl::StrSplit(parts[1], ',')) {
      cursor.positions.push_back(0);
      good = good && absl::SimpleAtoi(number, &cursor.positions.back()) && cursor.positions.back() >= 0;
    }
    good = good && cursor.positions.size() == static_cast<size_t>(partitions_);
    if (good && parts.size() == 3) {
      cursor.listed = std::string(parts[2]);
      good = ParseKeyText(cursor.listed).ok();
    }
  }
  if (!good) return absl::OutOfRangeError("cursor of another data set; begin without one");
  return cursor;
}

absl::StatusOr<std::vector<int64_t>> RedisStore::LastPositions() {
  std::vector<RedisCommand> commands;
  for (int p = 0; p < partitions_; ++p) commands.push_back({"GET", PartitionKey(p, "sequence")});
  ASSIGN_OR_RETURN(const std::vector<RedisReply> replies, client_.Run(commands));
  std::vector<int64_t> positions;
  for (int p = 0; p < partitions_; ++p) {
    positions.push_back(0);
    if (replies[p].kind != RedisReply::Kind::kNil && !absl::SimpleAtoi(replies[p].text, &positions.back())) {
      return Unexpected(PartitionKey(p, "sequence"));
    }
  }
  return positions;
}

// Every partition lists in the order of keys; merged, so that readers see old episodes first.
absl::Status RedisStore::List(Cursor& cursor, size_t max, ChangeBatch& batch) {
  std::vector<RedisCommand> commands;
  for (int p = 0; p < partitions_; ++p) {
    commands.push_back({"ZRANGEBYLEX", PartitionKey(p, "live"), absl::StrCat("(", cursor.listed, "!"), "+", "LIMIT", "0", absl::StrCat(max)});
  }
  ASSIGN_OR_RETURN(const std::vector<RedisReply> replies, client_.Run(commands));
  std::vector<absl::string_view> members;
  for (const RedisReply& reply : replies) {
    for (const RedisReply& member : reply.elements) members.push_back(member.text);
  }
  // A partition that has more than it sent has sent `max`.
  const bool done = members.size() < max;
  std::sort(members.begin(), members.end());
  members.resize(std::min(members.size(), max));
  for (const absl::string_view member : members) {
    const std::pair<absl::string_view, absl::string_view> parts = absl::StrSplit(member, absl::MaxSplits(' ', 1));
    ASSIGN_OR_RETURN(const ChunkInfo info, ParseInfoText(parts.second));
    batch.changes.push_back({Change::Kind::kAppend, info});
    cursor.listed = std::string(parts.first);
  }
  if (done) {
    cursor.listed.clear();
    ASSIGN_OR_RETURN(const std::vector<int64_t> last, LastPositions());
    batch.caught_up = last == cursor.positions;
  }
  return absl::OkStatus();
}

absl::Status RedisStore::Follow(Cursor& cursor, size_t max, ChangeBatch& batch) {
  // Each partition gets its share of `max`; where that is less than one entry they take turns.
  const std::string share = absl::StrCat(std::max<size_t>(1, max / partitions_));
  std::vector<RedisCommand> commands;
  int64_t turn = 0;
  for (int p = 0; p < partitions_; ++p) {
    turn += cursor.positions[p] % partitions_;  // cursors come from the network: no overflow
    commands.push_back(RedisClient::Script(changes_, {PartitionKey(p, "log"), PartitionKey(p, "sequence")},
                                           {absl::StrCat(cursor.positions[p]), share}));
  }
  ASSIGN_OR_RETURN(const std::vector<RedisReply> replies, client_.Run(commands));
  batch.caught_up = true;
  for (int i = 0; i < partitions_; ++i) {
    const int p = static_cast<int>((turn + i) % partitions_);
    if (!IsArray(replies[p], 2)) return Unexpected(PartitionKey(p, "log"));
    const int64_t last = replies[p].elements[0].integer;
    if (last < 0) return absl::OutOfRangeError("cursor is too old; begin without one");
    for (const RedisReply& entry : replies[p].elements[1].elements) {
      if (batch.changes.size() == max) break;
      // An entry is its id, "<position>-0", and its one field: what happened, to which chunk.
      if (!IsArray(entry, 2) || !IsArray(entry.elements[1], 2)) return Unexpected(PartitionKey(p, "log"));
      absl::string_view id = entry.elements[0].text;
      const std::string& kind = entry.elements[1].elements[0].text;
      if (!absl::ConsumeSuffix(&id, "-0") || !absl::SimpleAtoi(id, &cursor.positions[p]) || (kind != "append" && kind != "evict")) {
        return Unexpected(PartitionKey(p, "log"));
      }
      ASSIGN_OR_RETURN(const ChunkInfo info, ParseInfoText(entry.elements[1].elements[1].text));
      batch.changes.push_back({kind == "append" ? Change::Kind::kAppend : Change::Kind::kEvict, info});
    }
    batch.caught_up = batch.caught_up && cursor.positions[p] == last;
  }
  return absl::OkStatus();
}

absl::Status RedisStore::AwaitChange(const Cursor& cursor, absl::Duration wait) {
  std::vector<RedisClient::StreamPosition> streams;
  for (int p = 0; p < partitions_; ++p) streams.push_back({PartitionKey(p, "log"), absl::StrCat(cursor.positions[p], "-0")});
  return client_.Await(streams, wait);
}

absl::StatusOr<ChangeBatch> RedisStore::Changes(const std::string& cursor_text, int max, absl::Duration wait) {
  const absl::Time deadline = absl::Now() + wait;
  const size_t limit = std::max(1, max);
  ChangeBatch batch;
  Cursor cursor;
  if (cursor_text.empty()) {
    ASSIGN_OR_RETURN(cursor.positions, LastPositions());
    cursor.listed = KeyText({0, 0});  // before every episode
  } else {
    ASSIGN_OR_RETURN(cursor, ParseCursor(cursor_text));
  }
  if (!cursor.listed.empty()) {
    RETURN_IF_ERROR(List(cursor, limit, batch));
  } else {
    while (true) {
      batch = {};
      RETURN_IF_ERROR(Follow(cursor, limit, batch));
      const absl::Duration left = deadline - absl::Now();
      if (!batch.changes.empty() || left <= absl::ZeroDuration()) break;
      RETURN_IF_ERROR(AwaitChange(cursor, left));
    }
  }
  batch.cursor = CursorText(cursor);
  return batch;
}

absl::StatusOr<VersionedValue> RedisStore::Get(const std::string& name) {
  RETURN_IF_ERROR(CheckName("name of a value", name));
  const std::string key = RunKey(absl::StrCat("value:", name));
  ASSIGN_OR_RETURN(RedisReply reply, client_.RunOne({"HMGET", key, "version", "value"}));
  if (!IsArray(reply, 2)) return Unexpected(key);
  VersionedValue value;
  if (reply.elements[0].kind == RedisReply::Kind::kNil) return value;
  if (!absl::SimpleAtoi(reply.elements[0].text, &value.version)) return Unexpected(key);
  value.value = std::move(reply.elements[1].text);
  return value;
}

absl::StatusOr<Store::TimedValue> RedisStore::GetUnlessKnown(const std::string& name, const ValueIdentity& known) {
  RETURN_IF_ERROR(CheckName("name of a value", name));
  const std::string key = RunKey(absl::StrCat("value:", name));
  ASSIGN_OR_RETURN(RedisReply reply, client_.RunOne(RedisClient::Script(
                                         get_unless_known_, {key}, {absl::StrCat(known.version), HashText(known.hash)})));
  if (!IsArray(reply, 2) && !IsArray(reply, 4)) return Unexpected(key);
  TimedValue answer;
  ASSIGN_OR_RETURN(answer.now, ToTime(reply.elements[0], reply.elements[1]));
  if (reply.elements.size() == 2) return answer;
  VersionedValue& value = answer.value.emplace();
  if (!absl::SimpleAtoi(reply.elements[2].text, &value.version)) return Unexpected(key);
  value.value = std::move(reply.elements[3].text);
  return answer;
}

// Not repeated when a connection breaks: if the first one was done, the second would look as if another came first.
absl::Status RedisStore::CompareAndSet(const std::string& name, int64_t expected_version, const std::string& value) {
  RETURN_IF_ERROR(CheckName("name of a value", name));
  const std::vector<std::string> arguments = {absl::StrCat(expected_version), absl::StrCat(NextVersion(expected_version, value)),
                                              value, HashText(ValueHash(value))};
  ASSIGN_OR_RETURN(const RedisReply reply,
                   client_.RunOne(RedisClient::Script(compare_and_set_, {RunKey(absl::StrCat("value:", name))}, arguments),
                                  /*repeatable=*/false));
  if (reply.kind == RedisReply::Kind::kInteger) return absl::OkStatus();
  return absl::AbortedError(absl::StrCat("value '", name, "' has version ", reply.text, ", not ", expected_version));
}

absl::Status RedisStore::PutSnapshot(const Snapshot& snapshot) {
  const SnapshotVersion& version = snapshot.version;
  if (version <= SnapshotVersion{}) return absl::OkStatus();
  const std::string order = absl::StrFormat("%016x%016x", version.generation, version.counter);
  return client_
      .RunOne(RedisClient::Script(put_snapshot_, {RunKey("snapshot")},
                                  {order, absl::StrCat(version.generation), absl::StrCat(version.counter), snapshot.file}))
      .status();
}

absl::StatusOr<Store::Snapshot> RedisStore::GetSnapshot() {
  const std::string key = RunKey("snapshot");
  ASSIGN_OR_RETURN(RedisReply reply, client_.RunOne({"HMGET", key, "generation", "counter", "file"}));
  if (!IsArray(reply, 3)) return Unexpected(key);
  if (reply.elements[0].kind == RedisReply::Kind::kNil) return absl::NotFoundError("no snapshot yet");
  Snapshot snapshot;
  if (!absl::SimpleAtoi(reply.elements[0].text, &snapshot.version.generation) ||
      !absl::SimpleAtoi(reply.elements[1].text, &snapshot.version.counter)) {
    return Unexpected(key);
  }
  snapshot.file = std::move(reply.elements[2].text);
  return snapshot;
}

absl::StatusOr<absl::Time> RedisStore::Now() {
  ASSIGN_OR_RETURN(const RedisReply reply, client_.RunOne(RedisClient::Script(time_, {RunKey("data_set")}, {})));
  if (!IsArray(reply, 2)) return NoTime();
  return ToTime(reply.elements[0], reply.elements[1]);
}

absl::Status RedisStore::Count(DataSetSummary& summary) {
  Cursor cursor;
  cursor.listed = KeyText({0, 0});
  while (!cursor.listed.empty()) {
    ChangeBatch batch;
    RETURN_IF_ERROR(List(cursor, kListBatch, batch));
    summary.chunks += static_cast<int64_t>(batch.changes.size());
    for (const Change& change : batch.changes) summary.bytes += change.info.payload_bytes;
  }
  return absl::OkStatus();
}

// Keys of different slots cannot go in one command.
absl::Status Unlink(RedisClient& client, const std::vector<std::string>& keys) {
  std::map<int, RedisCommand> by_slot;
  for (const std::string& key : keys) {
    RedisCommand& command = by_slot[RedisKeySlot(key)];
    if (command.empty()) command.push_back("UNLINK");
    command.push_back(key);
  }
  std::vector<RedisCommand> commands;
  for (auto& [slot, command] : by_slot) commands.push_back(std::move(command));
  return client.Run(commands).status();
}

// The names of the runs that have a data set there.
absl::StatusOr<std::set<std::string>> FindRuns(const RedisLocation& location, absl::Duration timeout) {
  RedisClient client(location, timeout, /*max_connections=*/1);
  std::set<std::string> runs;
  const auto add = [&runs](const std::vector<std::string>& keys) {
    for (absl::string_view key : keys) {
      const bool ours = absl::ConsumePrefix(&key, kKeyPrefix) && absl::ConsumeSuffix(&key, kDataSetSuffix);
      if (ours && CheckName("", key).ok()) runs.emplace(key);
    }
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(client.Scan(absl::StrCat(kKeyPrefix, "*", kDataSetSuffix), add));
  return runs;
}

// Removes the keys of the data set but the one by which it is found. Returns how many there were.
absl::StatusOr<int64_t> UnlinkContents(RedisClient& client, const std::string& run) {
  const std::string data_set = absl::StrCat(kKeyPrefix, run, kDataSetSuffix);
  int64_t found = 0;
  const auto remove = [&](const std::vector<std::string>& keys) {
    std::vector<std::string> victims;
    for (const std::string& key : keys) {
      if (key != data_set) victims.push_back(key);
    }
    found += static_cast<int64_t>(victims.size());
    return victims.empty() ? absl::OkStatus() : Unlink(client, victims);
  };
  // "orrery:{RUN}:…" and "orrery:{RUN:PARTITION}:…".
  RETURN_IF_ERROR(client.Scan(absl::StrCat(kKeyPrefix, run, "[:}]*"), remove));
  return found;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Store>> OpenRedisStore(const StoreOptions& options) {
  if (options.partitions < 1 || options.partitions > kMaxPartitions) {
    return absl::InvalidArgumentError(absl::StrCat("partitions is ", options.partitions, ", expected 1 to ", kMaxPartitions));
  }
  if (options.max_connections < 1 || options.max_connections > kMaxConnections) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_connections is ", options.max_connections, ", expected 1 to ", kMaxConnections));
  }
  ASSIGN_OR_RETURN(RedisLocation location, ParseRedisLocation(options.location));
  auto store = std::make_unique<RedisStore>(options, std::move(location));
  RETURN_IF_ERROR(store->Open(options.partitions));
  return store;
}

absl::StatusOr<std::vector<DataSetSummary>> ListRedisDataSets(const std::string& location, absl::Duration timeout) {
  ASSIGN_OR_RETURN(const RedisLocation parsed, ParseRedisLocation(location));
  ASSIGN_OR_RETURN(const std::set<std::string> runs, FindRuns(parsed, timeout));
  std::vector<DataSetSummary> summaries;
  for (const std::string& run : runs) {
    RedisStore store({.location = location, .run = run, .timeout = timeout}, parsed);
    absl::Status status = store.Open(0);
    DataSetSummary summary{run};
    if (status.ok()) status = store.Count(summary);
    if (absl::IsNotFound(status)) continue;  // deleted meanwhile
    if (absl::IsFailedPrecondition(status) || absl::IsDataLoss(status)) {
      LogWarning("cannot count data set={}: {}", run, status.ToString());
    } else {
      RETURN_IF_ERROR(status);
    }
    summaries.push_back(std::move(summary));
  }
  return summaries;
}

// The key by which the data set is found goes last: what was interrupted can be done again.
absl::Status DeleteRedisDataSet(const StoreOptions& options) {
  ASSIGN_OR_RETURN(RedisLocation location, ParseRedisLocation(options.location));
  RedisClient client(std::move(location), options.timeout, /*max_connections=*/1);
  const std::string data_set = absl::StrCat(kKeyPrefix, options.run, kDataSetSuffix);
  ASSIGN_OR_RETURN(const RedisReply schema, client.RunOne({"HGET", data_set, "schema"}));
  const bool there = schema.kind != RedisReply::Kind::kNil;
  if (there) RETURN_IF_ERROR(CheckSchema(options.run, schema.text));
  for (int pass = 0;; ++pass) {
    ASSIGN_OR_RETURN(const int64_t found, UnlinkContents(client, options.run));
    if (pass == 0 && found == 0 && !there) return NoDataSet(options.run);
    if (found == 0) break;
    if (pass == kDeletePasses) {
      return absl::FailedPreconditionError(
          absl::StrCat("data set '", options.run, "' is written to while it is deleted: stop its replay servers first"));
    }
  }
  return client.RunOne({"UNLINK", data_set}).status();
}

}  // namespace orrery
