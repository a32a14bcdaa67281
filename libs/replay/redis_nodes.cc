#include "libs/replay/redis_nodes.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

absl::StatusOr<std::vector<RedisSlotRange>> AskForSlots(RedisPool& pool, absl::Time deadline) {
  static const RedisCommand kCommand = {"CLUSTER", "SLOTS"};
  ASSIGN_OR_RETURN(RedisPool::Loan connection, pool.Take(deadline));
  const absl::StatusOr<std::vector<RedisReply>> replies = connection->Run({&kCommand}, deadline);
  if (!replies.ok()) {
    pool.Clear();
    return replies.status();
  }
  connection.GiveBack();
  const RedisReply& reply = (*replies)[0];
  if (reply.kind == RedisReply::Kind::kError) return RedisErrorStatus(pool.endpoint(), reply.text);
  ASSIGN_OR_RETURN(std::vector<RedisSlotRange> ranges, ParseRedisSlots(reply, pool.endpoint()));
  if (!ranges.empty()) return ranges;
  return absl::UnavailableError(absl::StrCat("Redis at ", EndpointText(pool.endpoint()), " knows no node that has slots"));
}

}  // namespace

RedisNodes::RedisNodes(RedisLocation location, int max_connections)
    : location_(std::move(location)), max_connections_(max_connections) {
  absl::MutexLock lock(&mu_);
  for (const RedisEndpoint& endpoint : location_.endpoints) Pool(endpoint);
  if (location_.cluster) return;
  owners_[kRedisSlots - 1] = {0, Pool(location_.endpoints[0])};
  known_ = true;
}

std::shared_ptr<RedisPool> RedisNodes::Pool(const RedisEndpoint& endpoint) {
  std::shared_ptr<RedisPool>& pool = pools_[endpoint];
  if (pool == nullptr) pool = std::make_shared<RedisPool>(endpoint, location_.login, max_connections_);
  return pool;
}

std::shared_ptr<RedisPool> RedisNodes::At(const RedisEndpoint& endpoint) {
  absl::MutexLock lock(&mu_);
  return Pool(endpoint);
}

void RedisNodes::Forget() {
  absl::MutexLock lock(&mu_);
  known_ = !location_.cluster;
}

void RedisNodes::Forget(const RedisEndpoint& knowing) {
  absl::MutexLock lock(&mu_);
  known_ = !location_.cluster;
  knowing_ = Pool(knowing);
}

std::vector<std::shared_ptr<RedisPool>> RedisNodes::Candidates() {
  absl::MutexLock lock(&mu_);
  std::vector<std::shared_ptr<RedisPool>> candidates;
  for (const auto& [endpoint, pool] : pools_) candidates.push_back(pool);
  std::rotate(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(turn_++ % candidates.size()),
              candidates.end());
  if (knowing_ != nullptr) candidates.insert(candidates.begin(), std::move(knowing_));
  knowing_ = nullptr;
  return candidates;
}

void RedisNodes::Assign(const std::vector<RedisSlotRange>& ranges) {
  absl::MutexLock lock(&mu_);
  owners_.clear();
  std::set<RedisEndpoint> needed(location_.endpoints.begin(), location_.endpoints.end());
  for (const RedisSlotRange& range : ranges) {
    owners_[range.last] = {range.first, Pool(range.primary)};
    needed.insert(range.primary);
  }
  std::erase_if(pools_, [&needed](const auto& entry) { return needed.count(entry.first) == 0; });
  known_ = true;
}

absl::Status RedisNodes::FindSlots(absl::Time deadline) {
  absl::Status status = absl::UnavailableError("no time was left to ask the Redis Cluster where its slots are");
  for (const std::shared_ptr<RedisPool>& pool : Candidates()) {
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration()) break;
    // One that hangs must not take the time of the others.
    const absl::StatusOr<std::vector<RedisSlotRange>> ranges = AskForSlots(*pool, deadline - left * 3 / 4);
    if (ranges.ok()) {
      Assign(*ranges);
      return absl::OkStatus();
    }
    status = ranges.status();
    if (!absl::IsUnavailable(status)) break;
  }
  return status;
}

absl::StatusOr<std::shared_ptr<RedisPool>> RedisNodes::Owner(absl::string_view key, absl::Time deadline) {
  const int slot = RedisKeySlot(key);
  for (bool asked = false;; asked = true) {
    {
      absl::MutexLock lock(&mu_);
      if (known_ || asked) {
        const auto owner = owners_.lower_bound(slot);
        if (owner != owners_.end() && owner->second.first <= slot) return owner->second.pool;
        known_ = false;
        if (asked) return absl::UnavailableError(absl::StrCat("no node of the Redis Cluster has slot ", slot));
      }
    }
    RETURN_IF_ERROR(FindSlots(deadline));
  }
}

absl::StatusOr<std::vector<std::shared_ptr<RedisPool>>> RedisNodes::Primaries(absl::Time deadline) {
  if (location_.cluster) RETURN_IF_ERROR(FindSlots(deadline));
  std::set<std::shared_ptr<RedisPool>> primaries;
  absl::MutexLock lock(&mu_);
  for (const auto& [last, owner] : owners_) primaries.insert(owner.pool);
  return std::vector<std::shared_ptr<RedisPool>>(primaries.begin(), primaries.end());
}

}  // namespace orrery
