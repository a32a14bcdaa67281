#include "libs/serving/batcher.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace orrery {
namespace {

// A client not heard of for this long is not waited for.
constexpr absl::Duration kClientMemory = absl::Seconds(1);

}  // namespace

absl::Status BatchRequest::CheckWanted(absl::Time now) const {
  if (cancelled()) return absl::CancelledError("the caller has gone");
  if (deadline > now) return absl::OkStatus();
  return absl::DeadlineExceededError(
      absl::StrCat("dropped before it was computed, after ", absl::FormatDuration(now - arrived_)));
}

Batcher::Batcher(Options options, std::function<void(Batch)> run)
    : options_(std::move(options)),
      run_(std::move(run)),
      depth_(AddGauge(*options_.registry, "planner_queue_depth", "Slots that wait to be computed.")),
      queue_seconds_(AddHistogram(*options_.registry, "planner_queue_seconds",
                                  "Time from the arrival of a request until its batch begins.", SecondsBuckets())),
      batch_size_(AddHistogram(*options_.registry, "planner_batch_size", "Slots computed together.", SizeBuckets())) {}

Batcher::~Batcher() { Close(); }

void Batcher::FailAll(std::vector<Dropped>& dropped) {
  for (Dropped& d : dropped) d.request->Fail(d.status);
  dropped.clear();
}

void Batcher::Enqueue(std::unique_ptr<BatchRequest> request) {
  std::vector<Dropped> dropped;
  {
    absl::MutexLock lock(&mu_);
    const absl::Time now = options_.clock->Now();
    if (!FitsLocked(request->slots)) DropDeadLocked(now, dropped);
    if (request->urgent && !FitsLocked(request->slots)) DisplaceLocked(request->slots, dropped);
    if (closed_) {
      dropped.push_back({std::move(request), absl::UnavailableError("the planner is shutting down")});
    } else if (!FitsLocked(request->slots)) {
      absl::Status full = FullLocked(request->slots);
      dropped.push_back({std::move(request), std::move(full)});
    } else {
      request->arrived_ = now;
      NoteClientLocked(request->client_id, now, 1);
      slots_waiting_ += request->slots;
      depth_.Set(static_cast<double>(slots_waiting_));
      (request->urgent ? urgent_ : usual_).push_back(std::move(request));
      changed_.Signal();
    }
  }
  FailAll(dropped);
}

bool Batcher::Step() {
  Batch batch;
  while (batch.empty()) {
    std::vector<Dropped> dropped;
    {
      absl::MutexLock lock(&mu_);
      if (closed_) return false;
      const absl::Time now = options_.clock->Now();
      DropDeadLocked(now, dropped);
      const absl::Time due = DueLocked(now);
      if (due <= now) {
        batch = TakeLocked(now);
      } else if (dropped.empty()) {
        options_.clock->WaitUntil(changed_, mu_, std::min(due, NextDeadlineLocked()));
      }
    }
    FailAll(dropped);
  }
  Run(std::move(batch));
  return true;
}

bool Batcher::TryStep() {
  Batch batch;
  std::vector<Dropped> dropped;
  {
    absl::MutexLock lock(&mu_);
    const absl::Time now = options_.clock->Now();
    DropDeadLocked(now, dropped);
    if (DueLocked(now) <= now) batch = TakeLocked(now);
  }
  FailAll(dropped);
  if (batch.empty()) return false;
  Run(std::move(batch));
  return true;
}

void Batcher::Close() {
  std::vector<Dropped> dropped;
  {
    absl::MutexLock lock(&mu_);
    closed_ = true;
    for (auto* queue : {&urgent_, &usual_}) {
      for (auto& request : *queue) {
        dropped.push_back({std::move(request), absl::UnavailableError("the planner is shutting down")});
      }
      queue->clear();
    }
    clients_.clear();
    idle_clients_.clear();
    slots_waiting_ = 0;
    depth_.Set(0);
    changed_.SignalAll();
  }
  FailAll(dropped);
}

size_t Batcher::known_clients() const {
  absl::MutexLock lock(&mu_);
  return clients_.size();
}

void Batcher::NoteClientLocked(const std::string& id, absl::Time seen, int64_t more) {
  Client& client = clients_[id];
  if (client.waiting == 0) idle_clients_.erase({client.seen, id});
  client.seen = seen;
  client.waiting += more;
  if (client.waiting == 0) idle_clients_.insert({client.seen, id});
}

void Batcher::ForgetClientsLocked(absl::Time now) {
  while (!idle_clients_.empty() && now - idle_clients_.begin()->first > kClientMemory) {
    clients_.erase(idle_clients_.begin()->second);
    idle_clients_.erase(idle_clients_.begin());
  }
}

void Batcher::ForgetLocked(const BatchRequest& request) {
  NoteClientLocked(request.client_id, clients_[request.client_id].seen, -1);
  slots_waiting_ -= request.slots;
  depth_.Set(static_cast<double>(slots_waiting_));
}

void Batcher::DropDeadLocked(absl::Time now, std::vector<Dropped>& dropped) {
  for (auto* queue : {&urgent_, &usual_}) {
    std::deque<std::unique_ptr<BatchRequest>> kept;
    for (auto& request : *queue) {
      absl::Status status = request->CheckWanted(now);
      if (status.ok()) {
        kept.push_back(std::move(request));
        continue;
      }
      ForgetLocked(*request);
      dropped.push_back({std::move(request), std::move(status)});
    }
    *queue = std::move(kept);
  }
}

bool Batcher::FitsLocked(int64_t slots) const {
  return slots_waiting_ == 0 || slots_waiting_ + slots <= options_.max_queue;
}

absl::Status Batcher::FullLocked(int64_t slots) const {
  return absl::ResourceExhaustedError(absl::StrCat("the queue is full: ", slots_waiting_, " slots wait and ", slots,
                                                   " came, expected at most ", options_.max_queue,
                                                   " together; try again later"));
}

void Batcher::DisplaceLocked(int64_t slots, std::vector<Dropped>& dropped) {
  int64_t urgent_slots = 0;
  for (const auto& request : urgent_) urgent_slots += request->slots;
  if (urgent_slots > 0 && urgent_slots + slots > options_.max_queue) return;
  while (!usual_.empty() && !FitsLocked(slots)) {
    const absl::Status full = FullLocked(slots);
    ForgetLocked(*usual_.back());
    dropped.push_back({std::move(usual_.back()), full});
    usual_.pop_back();
  }
}

absl::Time Batcher::DueLocked(absl::Time now) {
  ForgetClientsLocked(now);
  if (urgent_.empty() && usual_.empty()) return absl::InfiniteFuture();
  if (slots_waiting_ >= options_.max_batch || idle_clients_.empty()) return now;
  absl::Time oldest = absl::InfiniteFuture();
  for (const auto* queue : {&urgent_, &usual_}) {
    if (!queue->empty()) oldest = std::min(oldest, queue->front()->arrived_);
  }
  return std::max(oldest, idle_since_) + options_.max_delay;
}

absl::Time Batcher::NextDeadlineLocked() const {
  absl::Time next = absl::InfiniteFuture();
  for (const auto* queue : {&urgent_, &usual_}) {
    for (const auto& request : *queue) next = std::min(next, request->deadline);
  }
  return next;
}

Batcher::Batch Batcher::TakeLocked(absl::Time now) {
  Batch batch;
  int64_t slots = 0;
  for (auto* queue : {&urgent_, &usual_}) {
    // The first that does not fit ends the batch: taking smaller ones past it could starve it.
    while (!queue->empty() && (batch.empty() || slots + queue->front()->slots <= options_.max_batch)) {
      std::unique_ptr<BatchRequest> request = std::move(queue->front());
      queue->pop_front();
      slots += request->slots;
      ForgetLocked(*request);
      queue_seconds_.Observe(absl::ToDoubleSeconds(now - request->arrived_));
      batch.push_back(std::move(request));
    }
    if (!queue->empty()) break;
  }
  batch_size_.Observe(static_cast<double>(slots));
  return batch;
}

void Batcher::Run(Batch batch) {
  std::vector<std::string> clients;
  clients.reserve(batch.size());
  for (const auto& request : batch) clients.push_back(request->client_id);
  run_(std::move(batch));
  absl::MutexLock lock(&mu_);
  if (closed_) return;
  idle_since_ = options_.clock->Now();
  // However long the batch took, its clients have just been answered: they are about to come back.
  for (const std::string& client : clients) NoteClientLocked(client, idle_since_, 0);
}

}  // namespace orrery
