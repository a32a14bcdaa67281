#include "libs/base/trace.h"

#include <algorithm>
#include <atomic>
#include <random>

#include "absl/strings/str_cat.h"
#include "libs/base/random.h"

namespace orrery {
namespace {
constexpr size_t kLength = 55;  // of version 00

thread_local TraceContext current;

// At most 16 lowercase digits.
std::optional<uint64_t> ParseHex(absl::string_view digits) {
  uint64_t value = 0;
  for (const char c : digits) {
    const bool decimal = c >= '0' && c <= '9';
    if (!decimal && (c < 'a' || c > 'f')) return std::nullopt;
    value = value << 4 | static_cast<uint64_t>(decimal ? c - '0' : c - 'a' + 10);
  }
  return value;
}

uint64_t RandomWord() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

// Never 0, which stands for no id, and another one at every call with the same `base` (1 may come twice: once for the 0).
uint64_t NextId(absl::string_view name, uint64_t base) {
  static std::atomic<uint64_t> calls = 0;
  return std::max<uint64_t>(1, DeriveSeed(base, name, calls.fetch_add(1, std::memory_order_relaxed)));
}

uint64_t NextSpan() {
  static const uint64_t base = RandomWord();
  return NextId("span", base);
}
}  // namespace

std::string TraceContext::trace_id() const {
  return absl::StrCat(absl::Hex(trace_high, absl::kZeroPad16), absl::Hex(trace_low, absl::kZeroPad16));
}

std::string TraceContext::traceparent() const {
  return absl::StrCat("00-", trace_id(), "-", absl::Hex(span, absl::kZeroPad16), sampled ? "-01" : "-00");
}

TraceContext TraceContext::Child() const {
  TraceContext child = *this;
  child.span = NextSpan();
  return child;
}

std::optional<TraceContext> ParseTraceparent(absl::string_view text) {
  if (text.size() < kLength || text[2] != '-' || text[35] != '-' || text[52] != '-') return std::nullopt;
  const std::optional<uint64_t> version = ParseHex(text.substr(0, 2));
  if (!version.has_value() || *version == 0xff) return std::nullopt;
  if (text.size() > kLength && (*version == 0 || text[kLength] != '-')) return std::nullopt;
  const std::optional<uint64_t> high = ParseHex(text.substr(3, 16)), low = ParseHex(text.substr(19, 16));
  const std::optional<uint64_t> span = ParseHex(text.substr(36, 16)), flags = ParseHex(text.substr(53, 2));
  if (!high.has_value() || !low.has_value() || !span.has_value() || !flags.has_value()) return std::nullopt;
  const TraceContext context{*high, *low, *span, (*flags & 1) != 0};
  if (!context.valid()) return std::nullopt;
  return context;
}

TraceContext NewTrace() {
  static const uint64_t high = RandomWord(), low = RandomWord();
  return {NextId("trace", high), NextId("trace", low), NextSpan(), /*sampled=*/true};
}

TraceScope::TraceScope(const TraceContext& context) : before_(current) { current = context; }
TraceScope::~TraceScope() { current = before_; }

TraceContext CurrentTrace() { return current; }

}  // namespace orrery
