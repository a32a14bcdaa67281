#!/usr/bin/env bash
# Lays out what docker/Dockerfile copies to /usr/local of the images:
#   OUT/torch/lib          LibTorch, what it loads, and CUDA's libraries where /opt/cuda has them
#   OUT/PROGRAM/{bin,lib}  each program and the libraries that it loads beyond those and the base image's
#   OUT/suite              the Control Suite's task files
#
#   collect.sh PROGRAMS BASE OUT     folders: the built programs, the root of the base image, where to write
set -euo pipefail

programs="$1" base="$2" out="$3"
torch="$(echo "$ORRERY_CACHE"/torch-*/torch/lib)"
mapfile -t cuda < <(find /opt/cuda -name '*.so*' -path '*/lib/*' | sort)
folders=("$torch" "$ORRERY_CACHE"/{cudart,cupti}-*/nvidia/cu13/lib "$ORRERY_CACHE"/mujoco-*/mujoco)
for library in "${cuda[@]}"; do folders+=("$(dirname "$library")"); done
search="$(printf '%s\n' "${folders[@]}" | uniq | paste -sd:)"

# copy_libraries FILE LIB: what FILE loads goes to the folder LIB, except what the base image or OUT/torch/lib has.
copy_libraries() {
  local name path loaded
  loaded="$(LD_LIBRARY_PATH="$search" ldd "$1" | awk '$2 == "=>" {print $1, $3}')"
  while read -r name path; do
    case "$name" in
      libcuda.so.1 | libnvidia-ml.so.1) continue ;;  # the driver's, which the container gets from the machine
    esac
    [ "$path" != not ] || { echo "collect: error: $1 loads $name, which is not found" >&2; exit 1; }
    if [ -e "$base$path" ] || [ -e "$out/torch/lib/$name" ]; then continue; fi
    install -D --mode=755 "$path" "$2/$name"
  done <<<"$loaded"
}

roots=("$torch/libtorch_cpu.so" "$torch/libc10.so")
if [ ${#cuda[@]} -gt 0 ]; then
  # The last two are opened when they are first needed.
  roots+=("$torch"/lib{torch_cuda,c10_cuda,torch_nvshmem,torch_cuda_linalg,caffe2_nvrtc}.so)
fi
for library in "${roots[@]}" "${cuda[@]}"; do
  [ -L "$library" ] || install -D --mode=755 "$library" "$out/torch/lib/$(basename "$library")"
done
for library in "${roots[@]}"; do copy_libraries "$library" "$out/torch/lib"; done

for program in orrery-replay orrery-learner orrery-planner orrery-actor orrery; do
  install -D --mode=755 --strip "$programs/$program" "$out/$program/bin/$program"
  copy_libraries "$programs/$program" "$out/$program/lib"
done
for program in orrery-replay orrery-actor; do
  if compgen -G "$out/$program/lib/libtorch*" >/dev/null || readelf -d "$programs/$program" | grep -q libtorch; then
    echo "collect: error: $program loads LibTorch, which its image must not need" >&2
    exit 1
  fi
done

mkdir -p "$out"
cp -R "$(echo "$ORRERY_CACHE"/dm_control-*/dm_control/suite)" "$out/suite"
du -sh "$out"/*
