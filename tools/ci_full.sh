#!/usr/bin/env bash
# Everything that is too long for continuous integration: sanitizers, clang, the CUDA compile, buf lint.
# Each part runs even when an earlier one failed; the exit status is 0 only when all passed.
#
#   tools/ci_full.sh [part …]      parts: release asan tsan clang cuda lint    (default: all)
set -uo pipefail
cd "$(dirname "$0")/.."

run_part() {
  case "$1" in
    release) tools/test.sh ;;
    # LibTorch and the distribution's libraries are not instrumented: no leak check, and tsan reports Abseil's mutex (docs/plan.md).
    asan) ASAN_OPTIONS=detect_leaks=0 ORRERY_PRESET=asan tools/test.sh ;;
    tsan) ORRERY_PRESET=tsan tools/test.sh ;;
    clang) command -v clang++ >/dev/null || sudo_apt clang; cmake --preset clang && cmake --build --preset clang ;;
    cuda) tools/setup.sh && cmake --preset cuda && cmake --build --preset cuda ;;
    lint) command -v buf >/dev/null || { echo "buf not found: go install github.com/bufbuild/buf/cmd/buf@v1.50.0"; return 1; }
          buf lint ;;
    *) echo "ci_full: unknown part \"$1\": expected release, asan, tsan, clang, cuda or lint"; return 2 ;;
  esac
}

sudo_apt() {
  local sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo)
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(release asan tsan clang cuda lint)
failed=()
for part in "${parts[@]}"; do
  echo "ci_full: $part"
  run_part "$part" || failed+=("$part")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "ci_full: failed: ${failed[*]}"
  exit 1
fi
echo "ci_full: all passed: ${parts[*]}"
