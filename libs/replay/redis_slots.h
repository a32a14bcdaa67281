// What a client must know of Redis Cluster: which slot a key belongs to, and where the slots are.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "libs/replay/redis_connection.h"
#include "libs/replay/redis_location.h"

namespace orrery {

constexpr int kRedisSlots = 16384;

// CRC-16 (XMODEM) of the key modulo 16384; of its hash tag alone, if it has one: what stands between the first '{' and the
// next '}', unless that is nothing.
int RedisKeySlot(absl::string_view key);

// The slots `first` to `last` and their primary.
struct RedisSlotRange {
  int first = 0;
  int last = 0;
  RedisEndpoint primary;
  bool operator==(const RedisSlotRange&) const = default;
};

// Reads a reply to CLUSTER SLOTS. A node that does not say its host has the one that was `asked`. DATA_LOSS: not such a reply.
absl::StatusOr<std::vector<RedisSlotRange>> ParseRedisSlots(const RedisReply& reply, const RedisEndpoint& asked);

// "MOVED SLOT HOST:PORT": the slot has moved there. "ASK SLOT HOST:PORT": it is moving there, and the key may have moved.
struct RedisRedirect {
  bool ask = false;
  RedisEndpoint to;
  bool operator==(const RedisRedirect&) const = default;
};
// Nothing, if `error` is another one.
std::optional<RedisRedirect> ParseRedisRedirect(absl::string_view error, const RedisEndpoint& asked);

}  // namespace orrery
