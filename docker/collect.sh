#!/usr/bin/env bash
# Lays out what docker/Dockerfile copies to the root of the images:
#   OUT/runtime      into all: user, experiments, home folder
#   OUT/torch        LibTorch, what it loads, and CUDA's libraries where /opt/cuda has them, in usr/local/lib
#   OUT/suite        the Control Suite's task files, in usr/local/share/orrery
#   OUT/PROGRAM      each program and the libraries that it loads beyond those and the base image's, in usr/local, with the
#                    loader's list of them; each is then started with what its image will have
# Every file and folder gets the time SOURCE_DATE_EPOCH, so that the same files make the same layers.
#
#   collect.sh PROGRAMS BASE CONFIGS OUT     folders: built programs, the base image's root, experiments, where to write
set -euo pipefail

programs="$1" base="$2" configs="$3" out="$4"
torch="$(echo "$ORRERY_CACHE"/torch-*/torch/lib)"
mapfile -t cuda < <(find /opt/cuda -name '*.so*' -path '*/lib/*' | sort)
folders=("$torch" "$ORRERY_CACHE"/{cudart,cupti}-*/nvidia/cu13/lib "$ORRERY_CACHE"/mujoco-*/mujoco)
for library in "${cuda[@]}"; do folders+=("$(dirname "$library")"); done
search="$(printf '%s\n' "${folders[@]}" | uniq | paste -sd:)"

# copy_libraries FILE LIB: what FILE loads goes to the folder LIB, except what the base image or OUT/torch has.
copy_libraries() {
  local name path loaded
  loaded="$(LD_LIBRARY_PATH="$search" ldd "$1" | awk '$2 == "=>" {print $1, $3}')"
  while read -r name path; do
    case "$name" in
      libcuda.so.1 | libnvidia-ml.so.1) continue ;;  # the driver's, which the container gets from the machine
    esac
    [ "$path" != not ] || { echo "collect: error: $1 loads $name, which is not found" >&2; exit 1; }
    if [ -e "$base$path" ] || [ -e "$out/torch/usr/local/lib/$name" ]; then continue; fi
    install -D --mode=755 "$path" "$2/$name"
  done <<<"$loaded"
}

lay_out_runtime() {
  local root="$out/runtime"
  mkdir -p "$root"/etc/orrery
  { cat "$base/etc/passwd"; echo 'orrery:x:65532:65532::/var/lib/orrery:/usr/sbin/nologin'; } >"$root/etc/passwd"
  { cat "$base/etc/group"; echo 'orrery:x:65532:'; } >"$root/etc/group"
  cp -R "$configs"/. "$root/etc/orrery"
  install --directory --owner=65532 --group=65532 "$root/var/lib/orrery"
}

lay_out_torch() {
  local library roots=("$torch/libtorch_cpu.so" "$torch/libc10.so") lib="$out/torch/usr/local/lib"
  if [ ${#cuda[@]} -gt 0 ]; then
    # The last two are opened when they are first needed.
    roots+=("$torch"/lib{torch_cuda,c10_cuda,torch_nvshmem,torch_cuda_linalg,caffe2_nvrtc}.so)
  fi
  for library in "${roots[@]}" "${cuda[@]}"; do
    [ -L "$library" ] || install -D --mode=755 "$library" "$lib/$(basename "$library")"
  done
  for library in "${roots[@]}"; do copy_libraries "$library" "$lib"; done
}

# lay_out PROGRAM [torch]: a program, with LibTorch beneath or without.
lay_out() {
  local root="$out/$1" image
  install -D --mode=755 --strip "$programs/$1" "$root/usr/local/bin/$1"
  copy_libraries "$programs/$1" "$root/usr/local/lib"
  if [ -z "${2:-}" ] && { compgen -G "$root/usr/local/lib/libtorch*" || readelf -d "$programs/$1" | grep -q libtorch; } >&2; then
    echo "collect: error: $1 loads LibTorch, which its image must not need" >&2
    exit 1
  fi
  image="$(mktemp -d)"  # as it will be
  cp -a "$base"/. "$image"
  cp -al "$root"/. ${2:+"$out/$2"/.} "$image"
  ldconfig -r "$image"
  install -D --mode=644 "$image/etc/ld.so.cache" "$root/etc/ld.so.cache"
  chroot "$image" "/usr/local/bin/$1" --version
  rm -rf "$image"
}

lay_out_runtime
lay_out_torch
mkdir -p "$out/suite/usr/local/share/orrery"
cp -R "$(echo "$ORRERY_CACHE"/dm_control-*/dm_control/suite)" "$out/suite/usr/local/share/orrery/suite"
lay_out orrery-replay
lay_out orrery-actor
lay_out orrery-learner torch
lay_out orrery-planner torch
lay_out orrery torch
find "$out" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
du -sh "$out"/*
