#include "libs/base/log.h"

#include <spdlog/sinks/stdout_sinks.h>

#include <memory>

#include "absl/strings/str_cat.h"

namespace orrery {

absl::Status InitLogging(const std::string& program, const std::string& level) {
  const bool known = level == "debug" || level == "info" || level == "warning" || level == "error" || level == "off";
  if (!known) {
    return absl::InvalidArgumentError(
        absl::StrCat("log level \"", level, "\": expected debug, info, warning, error or off"));
  }
  auto sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  auto logger = std::make_shared<spdlog::logger>(program, sink);
  logger->set_pattern("%Y-%m-%dT%H:%M:%S.%e %L %n] %v");
  logger->set_level(spdlog::level::from_str(level));
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(logger);
  return absl::OkStatus();
}

}  // namespace orrery
