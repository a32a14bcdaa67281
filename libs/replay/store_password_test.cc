#include "libs/replay/store_password.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/replay/redis_location.h"

namespace orrery {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class StorePasswordTest : public ::testing::Test {
 protected:
  void SetUp() override { unsetenv(kStorePasswordVariable); }
  void TearDown() override { unsetenv(kStorePasswordVariable); }
  std::string File(const std::string& text) {
    const std::string path = folder_ / "password";
    EXPECT_OK(WriteFileAtomically(path, text));
    return path;
  }

  TempDir folder_;
};

TEST_F(StorePasswordTest, PutsTheTextOfTheFileIntoTheLocation) {
  EXPECT_THAT(AddStorePassword("redis://h:1", File("secret\n")), IsOkAndHolds("redis://:secret@h:1"));
  EXPECT_THAT(AddStorePassword("redis://me@h:1", File("secret")), IsOkAndHolds("redis://me:secret@h:1"));
  EXPECT_THAT(AddStorePassword("redis://me:@h:1", File("secret")), IsOkAndHolds("redis://me:secret@h:1"));
  EXPECT_THAT(AddStorePassword("redis-cluster://a:1,b:2", File("secret")), IsOkAndHolds("redis-cluster://:secret@a:1,b:2"));
}

TEST_F(StorePasswordTest, AnyCharactersArriveAtTheLogin) {
  for (const std::string password : {"p@ss:w/rd%40", "two\nlines\n", " ", "\xc3\xa4\xff~", "ends with\r"}) {
    ASSERT_OK_AND_ASSIGN(const std::string location, AddStorePassword("redis://u%40@h:1", File(password + "\n")));
    ASSERT_OK_AND_ASSIGN(const RedisLocation parsed, ParseRedisLocation(location));
    EXPECT_EQ(parsed.login.user, "u@");
    EXPECT_EQ(parsed.login.password, password);
    EXPECT_EQ(parsed.endpoints, (std::vector<RedisEndpoint>{{"h", 1}}));
  }
}

TEST_F(StorePasswordTest, TheVariableServesWhereNeitherFileNorLocationHasOne) {
  EXPECT_THAT(AddStorePassword("redis://h:1"), IsOkAndHolds("redis://h:1"));
  ASSERT_EQ(setenv(kStorePasswordVariable, "from the variable", 1), 0);
  EXPECT_THAT(AddStorePassword("redis://h:1"), IsOkAndHolds("redis://:from%20the%20variable@h:1"));
  EXPECT_THAT(AddStorePassword("redis://h:1", File("secret\n")), IsOkAndHolds("redis://:secret@h:1"));
  for (const std::string unchanged : {"redis://:own@h:1", "memory:", "file:redis://h:1", "nonsense"}) {
    EXPECT_THAT(AddStorePassword(unchanged), IsOkAndHolds(unchanged));
  }
  ASSERT_EQ(setenv(kStorePasswordVariable, "", 1), 0);
  EXPECT_THAT(AddStorePassword("redis://h:1"), IsOkAndHolds("redis://h:1"));
}

TEST_F(StorePasswordTest, ErrorsNameTheFileAndNoPassword) {
  const auto refused = [](const std::string& what) {
    return StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr(what), Not(HasSubstr("secret"))));
  };
  const std::string file = File("secret");
  EXPECT_THAT(AddStorePassword("file:x", file), refused(absl::StrCat("the password in ", file, " is for a Redis")));
  EXPECT_THAT(AddStorePassword("redis://:secret@h:1", file), refused(absl::StrCat("and so has ", file)));
  for (const std::string nothing : {"", "\n"}) {
    EXPECT_THAT(AddStorePassword("redis://h:1", File(nothing)), refused(absl::StrCat(file, " is empty")));
  }
  const std::string missing = folder_ / "missing";
  EXPECT_THAT(AddStorePassword("redis://h:1", missing), StatusIs(absl::StatusCode::kNotFound, HasSubstr(missing)));
}

}  // namespace
}  // namespace orrery
