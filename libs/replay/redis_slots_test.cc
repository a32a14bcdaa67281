#include "libs/replay/redis_slots.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;

TEST(RedisKeySlot, IsTheSpecifiedChecksumOfTheHashTag) {
  // 0x31C3 is the check value of CRC-16/XMODEM; the others are in Redis's documentation of CLUSTER KEYSLOT.
  EXPECT_EQ(RedisKeySlot("123456789"), 0x31C3);
  EXPECT_EQ(RedisKeySlot("somekey"), 11058);
  EXPECT_EQ(RedisKeySlot("foo{hash_tag}"), 2515);
  EXPECT_EQ(RedisKeySlot("bar{hash_tag}"), 2515);
  EXPECT_EQ(RedisKeySlot("hash_tag"), 2515);
  EXPECT_EQ(RedisKeySlot(""), 0);
  // Only the first pair of braces counts, and only if there is something in it.
  EXPECT_EQ(RedisKeySlot("a{hash_tag}{b}"), 2515);
  EXPECT_EQ(RedisKeySlot("a}{hash_tag}"), 2515);
  EXPECT_EQ(RedisKeySlot("foo{{bar}}zap"), RedisKeySlot("{bar"));
  EXPECT_NE(RedisKeySlot("foo{}{bar}"), RedisKeySlot("bar"));
  EXPECT_NE(RedisKeySlot("foo{bar"), RedisKeySlot("bar"));
  EXPECT_NE(RedisKeySlot("\xff"), RedisKeySlot("\x7f"));
}

RedisReply Number(int64_t value) {
  RedisReply reply;
  reply.kind = RedisReply::Kind::kInteger;
  reply.integer = value;
  return reply;
}
RedisReply Word(const std::string& text) {
  RedisReply reply;
  reply.kind = RedisReply::Kind::kString;
  reply.text = text;
  return reply;
}
RedisReply List(std::vector<RedisReply> elements) {
  RedisReply reply;
  reply.kind = RedisReply::Kind::kArray;
  reply.elements = std::move(elements);
  return reply;
}

const RedisEndpoint kAsked = {"asked", 7000};

TEST(ParseRedisSlots, GivesTheRangesAndTheirPrimaries) {
  const RedisReply node = List({Word("10.0.0.1"), Number(7001), Word("id")});
  const RedisReply replica = List({Word("10.0.0.2"), Number(7002), Word("id"), List({})});
  const RedisReply nameless = List({RedisReply{}, Number(7003), Word("id")});
  const RedisReply unknown = List({Word("?"), Number(7004), Word("id")});
  EXPECT_THAT(ParseRedisSlots(List({List({Number(0), Number(99), node, replica}), List({Number(100), Number(100), nameless}),
                                    List({Number(200), Number(16383), unknown})}),
                              kAsked),
              IsOkAndHolds(ElementsAre(RedisSlotRange{0, 99, {"10.0.0.1", 7001}}, RedisSlotRange{100, 100, {"asked", 7003}},
                                       RedisSlotRange{200, 16383, {"asked", 7004}})));
  EXPECT_THAT(ParseRedisSlots(List({}), kAsked), IsOkAndHolds(ElementsAre()));

  const auto damaged = StatusIs(absl::StatusCode::kDataLoss, ::testing::HasSubstr("Redis at asked:7000"));
  EXPECT_THAT(ParseRedisSlots(Word("x"), kAsked), damaged);
  EXPECT_THAT(ParseRedisSlots(List({Word("x")}), kAsked), damaged);
  EXPECT_THAT(ParseRedisSlots(List({List({Number(0), Number(9)})}), kAsked), damaged);
  EXPECT_THAT(ParseRedisSlots(List({List({Number(0), Number(9), Word("x")})}), kAsked), damaged);
  EXPECT_THAT(ParseRedisSlots(List({List({Number(-1), Number(9), node})}), kAsked), damaged);
  EXPECT_THAT(ParseRedisSlots(List({List({Number(9), Number(8), node})}), kAsked), damaged);
  EXPECT_THAT(ParseRedisSlots(List({List({Number(0), Number(16384), node})}), kAsked), damaged);
  EXPECT_THAT(ParseRedisSlots(List({List({Number(0), Number(9), List({Word("h"), Number(0), Word("id")})})}), kAsked), damaged);
}

TEST(ParseRedisRedirect, ReadsMovedAndAsk) {
  EXPECT_EQ(ParseRedisRedirect("MOVED 3999 127.0.0.1:6381", kAsked), (RedisRedirect{false, {"127.0.0.1", 6381}}));
  EXPECT_EQ(ParseRedisRedirect("ASK 3999 host.example:6381", kAsked), (RedisRedirect{true, {"host.example", 6381}}));
  EXPECT_EQ(ParseRedisRedirect("MOVED 3999 ::1:6381", kAsked), (RedisRedirect{false, {"::1", 6381}}));
  EXPECT_EQ(ParseRedisRedirect("MOVED 3999 :6381", kAsked), (RedisRedirect{false, {"asked", 6381}}));
  EXPECT_EQ(ParseRedisRedirect("MOVED 3999 ?:6381", kAsked), (RedisRedirect{false, {"asked", 6381}}));
  for (const char* error : {"", "MOVED", "MOVED 3999", "MOVED 3999 host", "MOVED 3999 host:x", "MOVED 3999 host:0",
                            "MOVED 3999 host:70000", "MOVEDX 3999 host:1", "ERR unknown command", "TRYAGAIN Multiple keys"}) {
    EXPECT_EQ(ParseRedisRedirect(error, kAsked), std::nullopt) << error;
  }
}

}  // namespace
}  // namespace orrery
