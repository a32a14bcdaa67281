// Makes jemalloc the allocator of a program that makes and drops large arrays all the time, and keeps the memory that it has freed.
//
// An update allocates and frees the same large arrays again and again. The C library gives those back to the system each
// time, and a fifth of an update at PlaNet's sizes went into the pages that came back (docs/benchmarks.md). One arena, because the
// threads that share an update pass arrays to each other. A large piece of freed memory may be cut up for a small array
// (lg_extent_max_active_fit): by default jemalloc takes new memory for that, and as it never gives any back here, a training run grew to
// ten times what it used. The price: a program stays as large as it once was.
#include <jemalloc/jemalloc.h>

extern "C" {
// Read by jemalloc before main.
const char* malloc_conf = "narenas:1,dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0,lg_extent_max_active_fit:40";
// A reference, so that no linker drops the library.
extern const decltype(&mallctl) orrery_uses_jemalloc;
const decltype(&mallctl) orrery_uses_jemalloc = &mallctl;
}
