#include "libs/base/log.h"

#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/trace.h"

namespace orrery {
namespace {
// The logger formats on the thread that logs.
class TraceFlag : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg&, const std::tm&, spdlog::memory_buf_t& line) override {
    const TraceContext trace = CurrentTrace();
    if (!trace.valid()) return;
    const std::string field = absl::StrCat(" trace_id=", trace.trace_id());
    line.append(field.data(), field.data() + field.size());
  }
  std::unique_ptr<spdlog::custom_flag_formatter> clone() const override { return std::make_unique<TraceFlag>(); }
};
}  // namespace

absl::Status InitLogging(const std::string& program, const std::string& level) {
  const bool known = level == "debug" || level == "info" || level == "warning" || level == "error" || level == "off";
  if (!known) {
    return absl::InvalidArgumentError(
        absl::StrCat("log level \"", level, "\": expected debug, info, warning, error or off"));
  }
  auto sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  auto logger = std::make_shared<spdlog::logger>(program, sink);
  auto formatter = std::make_unique<spdlog::pattern_formatter>();
  formatter->add_flag<TraceFlag>('*').set_pattern("%Y-%m-%dT%H:%M:%S.%e %L %n] %v%*");
  logger->set_formatter(std::move(formatter));
  logger->set_level(spdlog::level::from_str(level));
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(logger);
  return absl::OkStatus();
}

}  // namespace orrery
