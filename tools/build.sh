#!/usr/bin/env bash
# Configures and builds a preset; tools/setup.sh must have run.
#
#   tools/build.sh [cmake --build arguments]      for example: tools/build.sh --target orrery
#
# Environment: ORRERY_PRESET (default release), ORRERY_JOBS (default: processors, at most one per 2 GiB of memory)
set -euo pipefail
cd "$(dirname "$0")/.."

preset="${ORRERY_PRESET:-release}"
memory_gib=$(awk '/MemTotal/ {print int($2 / 1048576)}' /proc/meminfo)
jobs=$((memory_gib / 2 < $(nproc) ? memory_gib / 2 : $(nproc)))
[ "$jobs" -gt 0 ] || jobs=1
jobs="${ORRERY_JOBS:-$jobs}"

echo "build: preset $preset, $jobs jobs"
cmake --preset "$preset" >/dev/null
cmake --build --preset "$preset" -j "$jobs" "$@"
