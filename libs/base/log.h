// Logging to standard error: lifecycle, configuration and degraded states; nothing per step. `key=value` for context.
// Within a TraceScope (trace.h) a line ends with ` trace_id=…`.
//   LogInfo("replay ready address={} chunks={}", address, chunks);
#pragma once

#include <spdlog/spdlog.h>

#include <string>
#include <utility>

#include "absl/status/status.h"

namespace orrery {

// Sets format and level ("debug", "info", "warning", "error", "off"). INVALID_ARGUMENT for another level.
absl::Status InitLogging(const std::string& program, const std::string& level);

template <typename... A>
void LogDebug(fmt::format_string<A...> f, A&&... a) {
  spdlog::debug(f, std::forward<A>(a)...);
}
template <typename... A>
void LogInfo(fmt::format_string<A...> f, A&&... a) {
  spdlog::info(f, std::forward<A>(a)...);
}
template <typename... A>
void LogWarning(fmt::format_string<A...> f, A&&... a) {
  spdlog::warn(f, std::forward<A>(a)...);
}
template <typename... A>
void LogError(fmt::format_string<A...> f, A&&... a) {
  spdlog::error(f, std::forward<A>(a)...);
}

}  // namespace orrery
