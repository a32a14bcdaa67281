// Short names for prometheus-cpp. Families are made on first use and shared; the metric of a label set begins at 0.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <string>

namespace orrery {

// References stay valid as long as the registry. Names without the prefix "orrery_", which these add.
prometheus::Counter& AddCounter(prometheus::Registry& registry, const std::string& name, const std::string& help,
                                const prometheus::Labels& labels = {});
prometheus::Gauge& AddGauge(prometheus::Registry& registry, const std::string& name, const std::string& help,
                            const prometheus::Labels& labels = {});
prometheus::Histogram& AddHistogram(prometheus::Registry& registry, const std::string& name, const std::string& help,
                                    const prometheus::Histogram::BucketBoundaries& buckets,
                                    const prometheus::Labels& labels = {});
// 100 µs to 60 s, about three per decade.
prometheus::Histogram::BucketBoundaries SecondsBuckets();
// 1, 2, 4, … 1024.
prometheus::Histogram::BucketBoundaries SizeBuckets();

}  // namespace orrery
