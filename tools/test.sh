#!/usr/bin/env bash
# Sets up, builds and runs every test of the normal suite. Knows Debian 12, Debian 13 and Ubuntu 24.04.
#
#   tools/test.sh [ctest arguments]      for example: tools/test.sh -R replay
#
# Environment: ORRERY_PRESET (default release), ORRERY_JOBS (default: processors, at most one per 2 GiB of memory)
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh

preset="${ORRERY_PRESET:-release}"
build_dir=build
[ "$preset" = release ] || build_dir="build-$preset"
memory_gib=$(awk '/MemTotal/ {print int($2 / 1048576)}' /proc/meminfo)
processors=$(nproc)
jobs="${ORRERY_JOBS:-$((memory_gib / 2 < processors ? (memory_gib / 2 > 0 ? memory_gib / 2 : 1) : processors))}"

echo "test: building preset $preset in $build_dir with $jobs jobs"
cmake --preset "$preset" >/dev/null
cmake --build --preset "$preset" -j "$jobs"
echo "test: running"
ctest --test-dir "$build_dir" --output-on-failure -j "$processors" "$@"
