#!/usr/bin/env bash
# Installs Orrery's development files, builds this example against them, and plays four episodes with a replay service.
#
#   examples/environment/test.sh BUILD_DIR
set -euo pipefail

build="$(cd "${1:?usage: test.sh BUILD_DIR}" && pwd)"
here="$(cd "$(dirname "$0")" && pwd)"
work="$(mktemp -d)"
replay=
finish() {
  [ -z "$replay" ] || kill "$replay" 2>/dev/null || true
  rm -rf "$work"
}
trap finish EXIT
die() { printf 'test: %s\n' "$*" >&2; tail -n 30 "$work"/*.log >&2 || true; exit 1; }

cmake --install "$build" --prefix "$work/installed" --component development >"$work/install.log" || die "not installed"
# A copy: nothing may be found by its place in the repository.
cp -r "$here" "$work/source"
cmake -S "$work/source" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$work/installed" \
  >"$work/configure.log" 2>&1 || die "not configured"
grep -q /torch "$work/build/build.ninja" && die "LibTorch is among what the example needs"
cmake --build "$work/build" >"$work/build.log" 2>&1 || die "not built"

config=("--config=$work/source/thermostat.textproto" --set learning.max_episodes=4)
"$build/bin/orrery-replay" "${config[@]}" --store=memory: --listen=127.0.0.1:0 --health_listen=127.0.0.1:0 \
  --metrics_listen=127.0.0.1:0 2>"$work/replay.log" &
replay=$!
port="$(grep -m1 -oP 'replay serving port=\K[0-9]+' < <(tail -n +1 -f --pid="$replay" "$work/replay.log"))" ||
  die "orrery-replay has ended"
timeout 60 "$work/build/thermostat-actor" "${config[@]}" --replay="127.0.0.1:$port" --metrics_listen=127.0.0.1:0 \
  2>"$work/actor.log" || die "thermostat-actor ended with status $?"
# 100 steps, two a decision, and the row before the first one.
episodes="$(grep -cE 'episode=[0-9]+ task=thermostat rows=51 return=[0-9]' "$work/actor.log" || true)"
[ "$episodes" = 4 ] || die "$episodes episodes of 51 rows were played, expected 4"
echo "test: built against the installed package, played $episodes episodes"
