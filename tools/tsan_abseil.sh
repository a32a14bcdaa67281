#!/usr/bin/env bash
# Builds the distribution's Abseil with the thread sanitizer and prints the folder of its libraries, for LD_LIBRARY_PATH: without it
# the sanitizer does not know absl::Mutex and reports what it guards as races.
set -euo pipefail

version=$(dpkg-query -W -f='${source:Upstream-Version}' libabsl-dev)
soversion=$(basename "$(readlink /usr/lib/*/libabsl_synchronization.so)" | cut -d. -f3)
prefix="${XDG_CACHE_HOME:-$HOME/.cache}/orrery/abseil-tsan-$version"
if [ ! -e "$prefix/done" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  # The source lies beside the package.
  package=$(cd "$work" && apt-get --print-uris download libabsl-dev | sed -n "s/^'\([^']*\)'.*/\1/p")
  /usr/lib/apt/apt-helper download-file "${package%/*}/abseil_$version.orig.tar.gz" "$work/abseil.tar.gz" >&2
  tar -xf "$work/abseil.tar.gz" -C "$work" --strip-components=1
  cp /usr/include/absl/base/options.h "$work/absl/base/options.h"  # the distribution's inline namespace
  sed -i "s/SOVERSION \"[^\"]*\"/SOVERSION \"$soversion\"/" "$work/CMake/AbseilHelpers.cmake"
  cmake -S "$work" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DCMAKE_CXX_STANDARD=17 \
    -DCMAKE_CXX_FLAGS="-fsanitize=thread -g1" -DABSL_PROPAGATE_CXX_STD=ON >&2
  cmake --build "$work/build" >&2
  mkdir -p "$prefix"
  find "$work/build" -name 'libabsl_*.so*' -exec cp -P {} "$prefix" \;
  touch "$prefix/done"
fi
echo "$prefix"
