#!/usr/bin/env bash
# Packs what the cuda preset built with the shared libraries that it loads, except LibTorch's and CUDA's, to run on a machine
# with a GPU and a LibTorch 2.11.0+cu130, for example that of a Python installation. Both machines are x86-64, and the other
# one's C library is at least as new as this one's. The programs there cannot render pictures.
#
#   tools/gpu_bundle.sh [--build=build-cuda] [--out=orrery-gpu.tar.xz]
#
# There: tar -xf orrery-gpu.tar.xz && orrery-gpu/gpu_check.sh --reference=SCRIPT, or orrery-gpu/run orrery …
set -euo pipefail
cd "$(dirname "$0")/.."

LIMIT_MIB=60
# Of the C library, LibTorch and CUDA: they are there.
LEFT_OUT='ld-linux|libc\.|libm\.|libdl\.|libpthread\.|librt\.|libutil\.|libresolv\.|libgomp|libtorch|libc10|libshm|libcaffe2'
LEFT_OUT="$LEFT_OUT|libcuda|libcupti|libcublas|libcudnn|libcufft|libcufile|libcurand|libcusolver|libcusparse|libnccl|libnv"
PROGRAMS=(bin/orrery bin/orrery-actor bin/orrery-replay bin/orrery-learner bin/orrery-planner test/gpu_test)

say() { printf 'gpu_bundle: %s\n' "$*"; }
die() { printf 'gpu_bundle: error: %s\n' "$*" >&2; exit 1; }

build=build-cuda
out=orrery-gpu.tar.xz
for argument in "$@"; do
  case "$argument" in
    --build=*) build="${argument#*=}" ;;
    --out=*) out="${argument#*=}" ;;
    *) die "unknown argument \"$argument\": expected --build=FOLDER or --out=FILE" ;;
  esac
done

# A stand-in for OSMesa, with which no context can be made: the real one loads LLVM, which is most of the limit by itself.
make_osmesa() {
  nm -D --undefined-only "$@" | sed -nE 's/^ *[Uw] ((OSMesa|gl)[A-Z][A-Za-z0-9]*).*/void* \1(void) { return 0; }/p' |
    sort -u | cc -shared -fPIC -w -Wl,-soname,libOSMesa.so.8 -x c -o "$root/lib/libOSMesa.so.8" -
}

# The other shared libraries that a program loads here, with the stand-in.
libraries() {
  LD_LIBRARY_PATH="$root/lib" ldd "$1" | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | grep -Ev "/($LEFT_OUT)[^/]*\$"
}

stage="$(mktemp -d)"
trap 'rm -rf "$stage"' EXIT
root="$stage/orrery-gpu"
mkdir -p "$root/bin" "$root/lib" "$root/golden"
for program in "${PROGRAMS[@]}"; do
  [ -x "$build/$program" ] || die "$build/$program is missing: cmake --preset cuda && cmake --build --preset cuda"
  case "$program" in
    bin/orrery-actor | bin/orrery-replay) ;;  # without LibTorch
    *) readelf -d "$build/$program" | grep -q 'libtorch_cuda\.so' ||
         die "$build/$program does not load libtorch_cuda.so: not built with -DORRERY_CUDA=ON" ;;
  esac
  strip -o "$root/bin/$(basename "$program")" "$build/$program"
done
make_osmesa "$root"/bin/*
for program in "$root"/bin/*; do
  libraries "$program" >>"$stage/libraries"
done
sort -u "$stage/libraries" | grep -v "^$root/" | while read -r library; do
  cp -L "$library" "$root/lib/"
done
cp tools/gpu_run.sh "$root/run"
cp tools/gpu_check.sh tools/gpu_check.py "$root/"
cp tests/golden/golden_planet.safetensors "$root/golden/"

say "packing $(ls "$root/bin" | wc -l) programs and $(ls "$root/lib" | wc -l) libraries"
tar -C "$stage" -c orrery-gpu | xz -6 -T0 >"$out"
bytes="$(stat -c %s "$out")"
say "$out: $((bytes / 1048576)) MiB"
[ "$bytes" -le $((LIMIT_MIB * 1048576)) ] || die "$out has $bytes bytes; expected at most $LIMIT_MIB MiB"
