// Runs `orrery` as a program, for tests.
#pragma once

#include <sys/wait.h>

#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"

namespace orrery {

struct Outcome {
  int code = -1;       // 128 + signal where one ended it
  std::string output;  // standard output and error
};

// `before` stands before the program in the shell's line: variables, for example.
inline Outcome Orrery(const std::string& arguments, const std::string& before = "") {
  Outcome outcome;
  const std::string command = absl::StrCat(before, ORRERY_BIN_DIR, "/orrery ", arguments, " 2>&1");
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return outcome;
  char buffer[4096];
  while (size_t n = std::fread(buffer, 1, sizeof(buffer), pipe)) outcome.output.append(buffer, n);
  const int status = pclose(pipe);
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return outcome;
}

}  // namespace orrery
