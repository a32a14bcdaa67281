// Whether episodes leave memory behind, with the allocator of the programs: the C library's own scatters what a thousand OpenGL
// contexts leave free, so that 37 MiB more are resident with nothing more in use. ORRERY_LEAK_EPISODES=10000 is the long form.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/envs/environment.h"

namespace orrery {
namespace {

constexpr int kWarmUp = 100;    // episodes after which everything was allocated once
constexpr int kMakeEvery = 10;  // episodes of one environment: each has an OpenGL context of its own
constexpr double kMiB = 1 << 20;

int Episodes() {
  const char* const text = std::getenv("ORRERY_LEAK_EPISODES");
  int episodes = 300;
  EXPECT_TRUE(text == nullptr || absl::SimpleAtoi(text, &episodes)) << "ORRERY_LEAK_EPISODES is " << text;
  return episodes;
}

// Bytes that the process holds in memory.
double Resident() {
  const std::string statm = ReadFile("/proc/self/statm").value();
  const std::vector<std::string> pages = absl::StrSplit(statm, ' ');
  double resident = 0;
  EXPECT_TRUE(absl::SimpleAtod(pages.at(1), &resident)) << statm;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE));
}

void PlayEpisode(Environment& environment, int seed) {
  ASSERT_OK_AND_ASSIGN(TimeStep step, environment.Reset(seed));
  const std::vector<float> action(environment.spec().action.size, 0.5f);
  while (!step.is_last) {
    ASSERT_OK_AND_ASSIGN(step, environment.Step(action));
  }
}

// A lost picture (3 KiB) an episode is 30 MiB in the long form; a lost OpenGL context with its buffers is megabytes by itself.
TEST(LeakTest, MemoryDoesNotGrowWithEpisodes) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers keep freed memory; AddressSanitizer looks for leaks itself";
#endif
  const int episodes = Episodes();
  const EnvironmentOptions options = {.task = "cartpole_swingup", .action_repeat = 4, .image_size = 32, .time_limit = 8};
  std::unique_ptr<Environment> environment;
  double warm = 0;
  for (int episode = 0; episode < kWarmUp + episodes; ++episode) {
    if (episode == kWarmUp) warm = Resident();
    if (episode % kMakeEvery == 0) {
      environment.reset();
      ASSERT_OK_AND_ASSIGN(environment, MakeEnvironment(options));
    }
    PlayEpisode(*environment, episode);
    if (episode % 1000 == 0) std::printf("episode %d: %.1f MiB resident\n", episode, Resident() / kMiB);
  }
  const double grown = Resident() - warm;
  std::printf("%d episodes after %d: %.1f MiB resident, %+.2f MiB\n", episodes, kWarmUp, Resident() / kMiB, grown / kMiB);
  EXPECT_LT(grown, 4 * kMiB);
}

}  // namespace
}  // namespace orrery
