#include "libs/telemetry/call_trace.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/log_testing.h"
#include "libs/base/status_matchers.h"
#include "libs/telemetry/service_host.h"
#include "orrery/replay/v1/replay.grpc.pb.h"

namespace orrery {
namespace {
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ContainsRegex;
using ::testing::Each;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::SizeIs;

constexpr char kTraceId[] = "4bf92f3577b34da6a3ce929d0e0e4736";
constexpr char kSent[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
constexpr char kGetStats[] = "method=/orrery.replay.v1.ReplayService/GetStats";
constexpr char kListEpisodes[] = "method=/orrery.replay.v1.ReplayService/ListEpisodes";

// GetStats, answered by gRPC's threads, refuses the run "wrong" and says that "full" is; ListEpisodes is answered by another
// thread. Both log a line in the trace of their call.
class Service : public replay::v1::ReplayService::WithCallbackMethod_ListEpisodes<replay::v1::ReplayService::Service> {
 public:
  ~Service() override {
    if (thread_.joinable()) thread_.join();
  }
  grpc::Status GetStats(grpc::ServerContext* context, const replay::v1::GetStatsRequest* request,
                        replay::v1::GetStatsResponse*) override {
    Note(*context);
    if (request->run() == "full") return {grpc::StatusCode::RESOURCE_EXHAUSTED, "no room"};
    if (request->run() == "wrong") return {grpc::StatusCode::INVALID_ARGUMENT, "a \"wrong\"\nrun's trace_id=forged"};
    return grpc::Status::OK;
  }
  using WithCallbackMethod_ListEpisodes::ListEpisodes;
  grpc::ServerUnaryReactor* ListEpisodes(grpc::CallbackServerContext* context, const replay::v1::ListEpisodesRequest*,
                                         replay::v1::ListEpisodesResponse*) override {
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    if (thread_.joinable()) thread_.join();
    thread_ = std::thread([this, context, reactor] {
      Note(*context);
      reactor->Finish(grpc::Status::OK);
    });
    return reactor;
  }
  std::vector<TraceContext> seen() {
    absl::MutexLock lock(&mu_);
    return seen_;
  }

 private:
  void Note(const grpc::ServerContextBase& context) {
    const TraceContext trace = TraceOf(context);
    EXPECT_EQ(TraceOf(context).traceparent(), trace.traceparent()) << "another one at the second look";
    const TraceScope scope(trace);
    LogInfo("handled");
    absl::MutexLock lock(&mu_);
    seen_.push_back(trace);
  }

  std::thread thread_;
  absl::Mutex mu_;
  std::vector<TraceContext> seen_ ABSL_GUARDED_BY(mu_);
};

class CallTraceTest : public ::testing::Test {
 protected:
  void Start(const std::string& log_level) {
    log_.emplace(log_level);
    HostOptions options;
    options.name = "replay";
    options.listen = "127.0.0.1:0";
    options.registry = std::make_shared<prometheus::Registry>();
    options.services = {&service_};
    ASSERT_OK_AND_ASSIGN(host_, ServiceHost::Start(options));
    stub_ = Stub(grpc::CreateChannel(absl::StrCat("127.0.0.1:", host_->port()), grpc::InsecureChannelCredentials()));
  }
  static std::unique_ptr<replay::v1::ReplayService::Stub> Stub(const std::shared_ptr<grpc::Channel>& channel) {
    return replay::v1::ReplayService::NewStub(channel);
  }
  // Each header is a key and a value.
  using Headers = std::vector<std::pair<std::string, std::string>>;
  grpc::StatusCode GetStats(const Headers& headers, const std::string& run = "") {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
    for (const auto& [key, value] : headers) context.AddMetadata(key, value);
    replay::v1::GetStatsRequest request;
    request.set_run(run);
    replay::v1::GetStatsResponse response;
    return stub_->GetStats(&context, request, &response).error_code();
  }
  grpc::StatusCode ListEpisodes(const Headers& headers) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
    for (const auto& [key, value] : headers) context.AddMetadata(key, value);
    replay::v1::ListEpisodesResponse response;
    return stub_->ListEpisodes(&context, {}, &response).error_code();
  }
  // The lines so far that contain `what`. Only once.
  std::vector<std::string> Lines(const std::string& what) {
    host_->Shutdown(absl::Seconds(60));
    std::vector<std::string> lines = absl::StrSplit(log_->Take(), '\n');
    lines.erase(std::remove_if(lines.begin(), lines.end(), [&](const auto& line) { return !absl::StrContains(line, what); }),
                lines.end());
    return lines;
  }

  std::optional<CapturedLog> log_;
  Service service_;
  std::unique_ptr<ServiceHost> host_;
  std::unique_ptr<replay::v1::ReplayService::Stub> stub_;
};

TEST_F(CallTraceTest, LogsInTheTraceThatWasSent) {
  Start("debug");
  EXPECT_EQ(GetStats({{"traceparent", kSent}}), grpc::StatusCode::OK);
  EXPECT_EQ(ListEpisodes({{"traceparent", kSent}}), grpc::StatusCode::OK);
  stub_ = Stub(host_->InProcessChannel());
  EXPECT_EQ(GetStats({{"traceparent", kSent}}), grpc::StatusCode::OK);
  for (const TraceContext& trace : service_.seen()) EXPECT_EQ(trace.traceparent(), kSent);
  const std::vector<std::string> lines = Lines(kTraceId);
  ASSERT_THAT(lines, SizeIs(6));  // of the handler, and that the call has ended
  const std::string end = absl::StrCat(" trace_id=", kTraceId);
  for (size_t i = 0; i < lines.size(); i += 2) {
    EXPECT_THAT(lines[i], EndsWith("I test] handled" + end));
    EXPECT_THAT(lines[i + 1], AllOf(HasSubstr("D test] call ended "), EndsWith(end), Not(HasSubstr("error="))));
    EXPECT_THAT(lines[i + 1], ContainsRegex("code=OK seconds=[0-9]+\\.[0-9]+ trace_id="));
    EXPECT_THAT(lines[i + 1], HasSubstr(i == 2 ? kListEpisodes : kGetStats));
  }
}

TEST_F(CallTraceTest, BeginsATraceWhereNoneWasSent) {
  Start("debug");
  EXPECT_EQ(GetStats({}), grpc::StatusCode::OK);
  EXPECT_EQ(ListEpisodes({}), grpc::StatusCode::OK);
  const std::vector<TraceContext> seen = service_.seen();
  ASSERT_THAT(seen, SizeIs(2));
  EXPECT_NE(seen[0].trace_id(), seen[1].trace_id());
  const std::vector<std::string> lines = Lines("trace_id=");
  ASSERT_THAT(lines, SizeIs(4));
  for (size_t i = 0; i < lines.size(); ++i) {
    EXPECT_TRUE(seen[i / 2].valid());
    EXPECT_THAT(lines[i], EndsWith(absl::StrCat(" trace_id=", seen[i / 2].trace_id())));
  }
}

TEST_F(CallTraceTest, BeginsATraceWhereAWrongOneWasSent) {
  Start("debug");
  const std::string id = kTraceId;
  const std::vector<Headers> all = {
      {{"traceparent", "nonsense"}},
      {{"traceparent", ""}},
      {{"traceparent", "00-" + id + "-0000000000000000-01"}},
      {{"traceparent", "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"}},
      {{"traceparent", std::string(kSent) + "-more"}},
      {{"traceparent", std::string(6000, 'a')}},
      {{"traceparent", kSent}, {"traceparent", "00-" + id + "-00f067aa0ba902b8-00"}},
      {{"traceparent-bin", kSent}},
  };
  for (const Headers& headers : all) EXPECT_EQ(GetStats(headers), grpc::StatusCode::OK) << headers[0].second.substr(0, 80);
  const std::vector<TraceContext> seen = service_.seen();
  ASSERT_THAT(seen, SizeIs(all.size()));
  const std::vector<std::string> lines = Lines("handled");
  ASSERT_THAT(lines, SizeIs(all.size()));
  for (size_t i = 0; i < all.size(); ++i) {
    EXPECT_TRUE(seen[i].valid());
    EXPECT_NE(seen[i].trace_id(), kTraceId) << i;
    EXPECT_THAT(lines[i], EndsWith(absl::StrCat(" trace_id=", seen[i].trace_id())));
  }
}

TEST_F(CallTraceTest, AnEnormousOneEndsNothing) {
  Start("info");
  EXPECT_NE(GetStats({{"traceparent", std::string(10'000, 'a')}}), grpc::StatusCode::OK);  // gRPC's limit for all metadata
  stub_ = Stub(host_->InProcessChannel());  // the other connection may end with that call
  EXPECT_EQ(GetStats({{"traceparent", kSent}}), grpc::StatusCode::OK);
  EXPECT_THAT(Lines(kTraceId), SizeIs(1));
}

// HTTP/2 by hand, because no client sends such headers.
std::string Frame(char type, char flags, char stream, const std::string& payload) {
  const size_t size = payload.size();
  const std::string head = {static_cast<char>(size >> 16), static_cast<char>(size >> 8), static_cast<char>(size), type, flags,
                            0, 0, 0, stream};
  return head + payload;
}

std::string Header(const std::string& key, const std::string& value) {  // each shorter than 127
  return absl::StrCat(std::string(1, '\0'), std::string(1, static_cast<char>(key.size())), key,
                      std::string(1, static_cast<char>(value.size())), value);
}

// Sends `bytes` and reads until the other side has answered or closed stream 1, or the connection.
void Exchange(int port, const std::string& bytes) {
  const int connection = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  ASSERT_EQ(connect(connection, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  const timeval patience{60, 0};
  ASSERT_EQ(setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)), 0);
  ASSERT_EQ(send(connection, bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
  const auto read = [connection](size_t size, std::string& into) {
    into.assign(size, '\0');
    return size == 0 || recv(connection, into.data(), size, MSG_WAITALL) == static_cast<ssize_t>(size);
  };
  std::string head, payload;
  while (read(9, head)) {
    const auto byte = [&head](size_t i) { return static_cast<uint8_t>(head[i]); };
    if (!read(size_t{byte(0)} << 16 | size_t{byte(1)} << 8 | byte(2), payload)) break;
    const bool ends_stream = (byte(3) == 0 || byte(3) == 1) && (byte(4) & 1) != 0;  // DATA or HEADERS
    if (byte(8) == 1 && (ends_stream || byte(3) == 3)) break;                       // 3: RST_STREAM
  }
  close(connection);
}

std::string Call(const std::string& path, const std::string& traceparent) {
  const std::string headers = Header(":method", "POST") + Header(":scheme", "http") + Header(":path", path) +
                              Header(":authority", "test") + Header("te", "trailers") +
                              Header("content-type", "application/grpc") + Header("traceparent", traceparent);
  return "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + Frame(4, 0, 0, "") + Frame(1, 4, 1, headers) +
         Frame(0, 1, 1, std::string(5, '\0'));
}

// A method that nobody serves is whatever the client has sent.
TEST_F(CallTraceTest, APathWritesNoLines) {
  Start("info");
  for (const std::string& path : {std::string("/x\nFORGED"), std::string("/x code=OK"), "/" + std::string(120, 'x') + "\x1b"}) {
    Exchange(host_->port(), Call(path, kSent));
  }
  const std::vector<std::string> lines = Lines("");
  EXPECT_THAT(lines, Contains(HasSubstr("method=unknown code=UNIMPLEMENTED ")).Times(3));
  EXPECT_THAT(lines, Each(AllOf(Not(HasSubstr("FORGED")), Not(HasSubstr("code=OK")), Not(HasSubstr("\x1b")))));
}

TEST_F(CallTraceTest, BytesInAHeaderEndNothing) {
  Start("debug");
  std::string binary;
  for (int i = 0; i < 55; ++i) binary += static_cast<char>(i * 37);
  for (const std::string& value : {binary, std::string(55, '\0'), std::string(kSent).replace(2, 1, 1, '\0')}) {
    Exchange(host_->port(), Call("/orrery.replay.v1.ReplayService/GetStats", value));
    EXPECT_EQ(GetStats({{"traceparent", kSent}}), grpc::StatusCode::OK);
  }
  EXPECT_GT(service_.seen().size(), 3u) << "gRPC let none of them through";
  for (const TraceContext& trace : service_.seen()) EXPECT_TRUE(trace.valid());
  EXPECT_THAT(Lines("handled trace_id=4bf92f3577b34da6a3ce929d0e0e4736"), SizeIs(3));
}

TEST_F(CallTraceTest, WarnsOfRequestsThatAreWrong) {
  Start("info");
  EXPECT_EQ(GetStats({{"traceparent", kSent}}, "full"), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(GetStats({{"traceparent", kSent}}, "wrong"), grpc::StatusCode::INVALID_ARGUMENT);
  const std::vector<std::string> lines = Lines("call ended");
  ASSERT_THAT(lines, SizeIs(1));
  EXPECT_THAT(lines[0], AllOf(HasSubstr("W test] "), HasSubstr(kGetStats), HasSubstr(" code=INVALID_ARGUMENT "),
                              HasSubstr(R"(error="a \"wrong\"\nrun's trace_id=forged")"),
                              EndsWith(absl::StrCat(" trace_id=", kTraceId))));
}

TEST_F(CallTraceTest, NamesOtherTracesThatACallIsAbout) {
  Start("debug");
  const std::string other = "0af7651916cd43dd8448eb211c80319c", third = "11111111111111111111111111111111";
  std::string most = other, too_many = other;
  for (size_t i = 1; i < kMaxTraceLinks; ++i) absl::StrAppend(&most, ",", third);
  absl::StrAppend(&too_many, most.substr(other.size()), ",", third);
  EXPECT_EQ(GetStats({{kTraceLinksKey, absl::StrCat(other, ",", third)}}), grpc::StatusCode::OK);
  EXPECT_EQ(GetStats({{kTraceLinksKey, most}}), grpc::StatusCode::OK);
  for (const std::string& wrong : {absl::StrCat(other, ","), absl::StrCat(other, " ", third), other.substr(1),
                                   absl::StrCat(other, ",", other.substr(1), "G"), too_many, std::string(",")}) {
    EXPECT_EQ(GetStats({{kTraceLinksKey, wrong}}), grpc::StatusCode::OK) << wrong;
  }
  const std::vector<std::string> lines = Lines("call ended");
  ASSERT_THAT(lines, SizeIs(8));
  EXPECT_THAT(lines[0], HasSubstr(absl::StrCat(" links=", other, ",", third, " trace_id=")));
  EXPECT_THAT(lines[1], HasSubstr(absl::StrCat(" links=", most, " trace_id=")));
  for (size_t i = 2; i < lines.size(); ++i) EXPECT_THAT(lines[i], Not(HasSubstr("links="))) << lines[i];
}

TEST(LineLimit, LeavesOutWhatIsTooMuchAndCountsIt) {
  LineLimit limit;
  const absl::Time begin = absl::UnixEpoch();
  for (int i = 0; i < LineLimit::kPerSecond; ++i) EXPECT_EQ(limit.Pass(begin + absl::Milliseconds(i)), 0);
  for (int i = 0; i < 7; ++i) EXPECT_EQ(limit.Pass(begin + absl::Milliseconds(999)), std::nullopt);
  EXPECT_EQ(limit.Pass(begin + absl::Seconds(1)), 7);
  EXPECT_EQ(limit.Pass(begin + absl::Seconds(1)), 0);
}

}  // namespace
}  // namespace orrery
