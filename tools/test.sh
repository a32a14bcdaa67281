#!/usr/bin/env bash
# Sets up, builds and runs every test of the normal suite. Knows Debian 12, Debian 13 and Ubuntu 24.04.
#
#   tools/test.sh [ctest arguments]      for example: tools/test.sh -R replay
#
# Environment: ORRERY_PRESET and ORRERY_JOBS as in tools/build.sh
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh
tools/build.sh

build_dir=build
[ "${ORRERY_PRESET:-release}" = release ] || build_dir="build-$ORRERY_PRESET"
echo "test: the Python package"
ORRERY_BIN_DIR="$PWD/$build_dir/bin" ORRERY_REQUIRE_PROGRAMS=1 tools/python/test.sh -q
echo "test: running"
ctest --test-dir "$build_dir" --output-on-failure -j "$(nproc)" "$@"
