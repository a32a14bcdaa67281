#include "libs/base/host_port.h"

#include <gtest/gtest.h>

namespace orrery {
namespace {

TEST(HostPort, ReadsEveryForm) {
  struct {
    const char* text;
    const char* host;
    int port;
    const char* written;
  } const cases[] = {{"localhost:7101", "localhost", 7101, "localhost:7101"},
                     {"127.0.0.1:0", "127.0.0.1", 0, "127.0.0.1:0"},
                     {"[::1]:65535", "::1", 65535, "[::1]:65535"},
                     {"::1:80", "::1", 80, "[::1]:80"},
                     {":9102", "", 9102, ":9102"},
                     {"9102", "", 9102, ":9102"}};
  for (const auto& expected : cases) {
    const std::optional<HostPort> parsed = ParseHostPort(expected.text);
    ASSERT_TRUE(parsed.has_value()) << expected.text;
    EXPECT_EQ(parsed->host, expected.host) << expected.text;
    EXPECT_EQ(parsed->port, expected.port) << expected.text;
    EXPECT_EQ(parsed->text(), expected.written);
  }
}

TEST(HostPort, RefusesTheRest) {
  for (const char* text : {"", "host", "host:", "host:x", "host:-1", "host:65536", "host:99999999999", "[::1:80",
                           "unix:/tmp/socket"}) {
    EXPECT_FALSE(ParseHostPort(text).has_value()) << text;
  }
}

}  // namespace
}  // namespace orrery
