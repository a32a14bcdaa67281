#include "libs/replay/redis_slots.h"

#include <array>
#include <cstdint>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

constexpr uint16_t kPolynomial = 0x1021;

constexpr std::array<uint16_t, 256> MakeTable() {
  std::array<uint16_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte << 8;
    for (int bit = 0; bit < 8; ++bit) value = (value & 0x8000) != 0 ? (value << 1) ^ kPolynomial : value << 1;
    table[byte] = static_cast<uint16_t>(value);
  }
  return table;
}
constexpr std::array<uint16_t, 256> kTable = MakeTable();

// Nodes leave their host out, or say "?", when they do not know by which name they are reached.
std::string HostOr(absl::string_view host, const RedisEndpoint& asked) {
  return host.empty() || host == "?" ? asked.host : std::string(host);
}

bool IsPort(int64_t port) { return port >= 1 && port <= 65535; }

}  // namespace

int RedisKeySlot(absl::string_view key) {
  const size_t open = key.find('{');
  if (open != absl::string_view::npos) {
    const size_t close = key.find('}', open + 1);
    if (close != absl::string_view::npos && close > open + 1) key = key.substr(open + 1, close - open - 1);
  }
  uint16_t crc = 0;
  for (const char c : key) crc = static_cast<uint16_t>((crc << 8) ^ kTable[(crc >> 8) ^ static_cast<uint8_t>(c)]);
  return crc % kRedisSlots;
}

absl::StatusOr<std::vector<RedisSlotRange>> ParseRedisSlots(const RedisReply& reply, const RedisEndpoint& asked) {
  const absl::Status damaged =
      absl::DataLossError(absl::StrCat("Redis at ", EndpointText(asked), " answers CLUSTER SLOTS with something else"));
  if (reply.kind != RedisReply::Kind::kArray) return damaged;
  std::vector<RedisSlotRange> ranges;
  for (const RedisReply& range : reply.elements) {
    // First slot, last slot, primary, replicas; a node is host, port, id, …
    if (range.elements.size() < 3 || range.elements[2].elements.size() < 2) return damaged;
    const int64_t first = range.elements[0].integer, last = range.elements[1].integer;
    const int64_t port = range.elements[2].elements[1].integer;
    if (first < 0 || last < first || last >= kRedisSlots || !IsPort(port)) return damaged;
    ranges.push_back({static_cast<int>(first), static_cast<int>(last),
                      {HostOr(range.elements[2].elements[0].text, asked), static_cast<int>(port)}});
  }
  return ranges;
}

std::optional<RedisRedirect> ParseRedisRedirect(absl::string_view error, const RedisEndpoint& asked) {
  const std::vector<absl::string_view> words = absl::StrSplit(error, ' ');
  if (words.size() != 3 || (words[0] != "MOVED" && words[0] != "ASK")) return std::nullopt;
  const size_t colon = words[2].rfind(':');
  RedisRedirect redirect{words[0] == "ASK", {}};
  if (colon == absl::string_view::npos || !absl::SimpleAtoi(words[2].substr(colon + 1), &redirect.to.port) ||
      !IsPort(redirect.to.port)) {
    return std::nullopt;
  }
  redirect.to.host = HostOr(words[2].substr(0, colon), asked);
  return redirect;
}

}  // namespace orrery
