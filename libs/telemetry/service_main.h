// What the main functions of the services share: flags, one-line errors, exit codes.
//
//   int main(int argc, char** argv) {
//     orrery::CommonFlags flags;
//     CLI::App app("Keeps the experience of a run.");
//     orrery::AddCommonFlags(app, {"replay", 7101, 7201, 9101}, flags);
//     app.add_option("--store", …);
//     return orrery::RunProgram(argc, argv, app, "orrery-replay", flags, [&] { return Serve(flags, …); });
//   }
//
// Serve makes the service, starts a host with MakeHostOptions, and ends with AwaitShutdown.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/telemetry/service_host.h"

namespace orrery {

inline constexpr char kVersion[] = "0.1.0";

// Name of a service ("replay") and its default ports on 127.0.0.1; 0: it has no such port and no such flag.
struct ServiceDefaults {
  std::string name;
  int port = 0;
  int health_port = 0;
  int metrics_port = 0;
};

struct CommonFlags {
  std::string listen;          // --listen
  std::string health_listen;   // --health_listen
  std::string metrics_listen;  // --metrics_listen
  double max_connection_age = 300;    // --max_connection_age, seconds; 0: no limit
  double max_connection_grace = 120;  // --max_connection_grace, seconds
  std::string config;          // --config; not required here: app.get_option("--config")->required()
  std::vector<std::string> set;    // --set, repeated
  std::string log_level = "info";  // --log_level
  bool healthcheck = false;        // --healthcheck
};

// Declares the flags above with their defaults; those of connections only where there is a gRPC port. `flags` must outlive
// `app`. --healthcheck makes every other flag optional.
void AddCommonFlags(CLI::App& app, const ServiceDefaults& defaults, CommonFlags& flags);

// Parses the command line and runs `body`. Exit code: 0 when `body` returns OK, and for --help and --version; 1 after
// printing "PROGRAM: error: MESSAGE" when it does not; 2 for a wrong flag. SIGINT and SIGTERM are blocked first, so that
// every thread started later leaves them to AwaitShutdown. With --healthcheck, AskReadiness runs in the place of `body`.
int RunProgram(int argc, const char* const* argv, CLI::App& app, const std::string& program, const CommonFlags& flags,
               const std::function<absl::Status()>& body);

// Whether the service that was started with the same flags is ready; asks at most 3 s. Asks gRPC's health service for
// "readiness" at --health_listen, where that is empty at --listen; a service with neither is asked for /readyz at
// --metrics_listen. An address of all interfaces is asked at 127.0.0.1. Returns the address that was asked. UNAVAILABLE: not
// ready, or nothing like it answers. INVALID_ARGUMENT: no such address, or its port is 0.
absl::StatusOr<std::string> AskReadiness(const CommonFlags& flags);

// "ROLE-HOST-PID-RANDOM": unique across machines, containers (whose process is always number 1) and restarts.
std::string MakeProcessId(const std::string& role);

// Name, addresses and age of connections from the flags, and a fresh registry; the services are the caller's to add.
HostOptions MakeHostOptions(const ServiceDefaults& defaults, const CommonFlags& flags);

// Logs the addresses that `host` serves, waits for SIGINT or SIGTERM, then drains: no longer ready, `drain` (which should wake
// handlers that wait), Shutdown with 10 s of grace.
void AwaitShutdown(ServiceHost& host, const std::string& name, const std::function<void()>& drain = [] {});

}  // namespace orrery
