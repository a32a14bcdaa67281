#include "libs/telemetry/metrics.h"

namespace orrery {
namespace {
std::string FullName(const std::string& name) { return "orrery_" + name; }
}  // namespace

// Register returns the family that has the name already, and Add the metric that has the labels.
prometheus::Counter& AddCounter(prometheus::Registry& registry, const std::string& name, const std::string& help,
                                const prometheus::Labels& labels) {
  return prometheus::BuildCounter().Name(FullName(name)).Help(help).Register(registry).Add(labels);
}

prometheus::Gauge& AddGauge(prometheus::Registry& registry, const std::string& name, const std::string& help,
                            const prometheus::Labels& labels) {
  return prometheus::BuildGauge().Name(FullName(name)).Help(help).Register(registry).Add(labels);
}

prometheus::Histogram& AddHistogram(prometheus::Registry& registry, const std::string& name, const std::string& help,
                                    const prometheus::Histogram::BucketBoundaries& buckets,
                                    const prometheus::Labels& labels) {
  return prometheus::BuildHistogram().Name(FullName(name)).Help(help).Register(registry).Add(labels, buckets);
}

prometheus::Histogram::BucketBoundaries SecondsBuckets() {
  return {1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60};
}

prometheus::Histogram::BucketBoundaries SizeBuckets() {
  prometheus::Histogram::BucketBoundaries buckets;
  for (int size = 1; size <= 1024; size *= 2) buckets.push_back(size);
  return buckets;
}

}  // namespace orrery
