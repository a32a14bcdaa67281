#include "libs/base/cpu.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace orrery {
namespace {

// Unlike ReadFile, without a size taken first: these files claim to be empty.
std::string ReadAll(const std::string& path) {
  std::ifstream in(path);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

// "QUOTA PERIOD" or "max PERIOD", in microseconds.
std::optional<double> ParseCpuMax(absl::string_view text) {
  const std::vector<absl::string_view> words = absl::StrSplit(text, absl::ByAnyChar(" \n"), absl::SkipEmpty());
  double quota = 0;
  double period = 0;
  if (words.size() != 2 || !absl::SimpleAtod(words[0], &quota) || !absl::SimpleAtod(words[1], &period)) return std::nullopt;
  if (!(quota > 0) || !(period > 0)) return std::nullopt;
  return quota / period;
}

}  // namespace

std::optional<double> CgroupCpuLimit(const std::string& root, absl::string_view self) {
  std::string group;
  for (absl::string_view line : absl::StrSplit(self, '\n')) {
    if (absl::ConsumePrefix(&line, "0::")) group = std::string(line);
  }
  std::optional<double> limit;
  while (true) {
    const std::optional<double> here = ParseCpuMax(ReadAll(absl::StrCat(root, group, "/cpu.max")));
    if (here.has_value() && (!limit.has_value() || *here < *limit)) limit = here;
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos) return limit;
    group.resize(slash);
  }
}

int AvailableCpus() {
  int cpus = 1;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cpus = std::max(1, CPU_COUNT(&set));
  const std::optional<double> limit = CgroupCpuLimit("/sys/fs/cgroup", ReadAll("/proc/self/cgroup"));
  if (limit.has_value() && *limit < cpus) cpus = std::max(1, static_cast<int>(std::ceil(*limit)));
  return cpus;
}

}  // namespace orrery
