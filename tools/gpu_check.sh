#!/usr/bin/env bash
# Checks what is computed on a GPU against the CPU, then times plans and updates beside PyTorch on the same GPU. Runs from the
# unpacked bundle of tools/gpu_bundle.sh, or in the repository where the cuda preset was built.
#
#   gpu_check.sh [--reference=SCRIPT] [--batches=1,64] [--repeats=20] [--skip-tests]
#
# SCRIPT is what tools/bench/compare.py takes; without it our times are printed alone. Prints one JSON object a line; exit
# status 0: everything agrees, 1: something differs or failed, 3: there is no GPU.
#
# Environment: PYTHON, an interpreter with torch 2.11.0+cu130 (default python3); ORRERY_LIBTORCH as in run
set -uo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
say() { printf 'gpu_check: %s\n' "$*" >&2; }

skip_tests=0
arguments=()
for argument in "$@"; do
  case "$argument" in
    --skip-tests) skip_tests=1 ;;
    --reference=* | --batches=* | --repeats=*) arguments+=("$argument") ;;
    *) say "error: unknown argument \"$argument\": expected --reference, --batches, --repeats or --skip-tests"; exit 2 ;;
  esac
done

if ! gpus="$(nvidia-smi -L 2>&1)" || ! grep -q '^GPU ' <<<"$gpus"; then
  say "error: no NVIDIA GPU was found here (nvidia-smi -L: ${gpus:-nothing}); nothing was checked"
  exit 3
fi
say "$(head -n 1 <<<"$gpus")"

if [ -x "$here/run" ]; then
  run=("$here/run")
  golden="$here/golden/golden_planet.safetensors"
else
  root="$(cd "$here/.." && pwd)"
  # The build's programs find their libraries by themselves, but CUDA's.
  cuda="$("${PYTHON:-python3}" -c 'import glob, importlib.util as util
spec = util.find_spec("torch")
print(":".join(glob.glob(spec.submodule_search_locations[0] + "/../nvidia/*/lib")) if spec else "")')"
  export LD_LIBRARY_PATH="$cuda${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  PATH="$root/build-cuda/bin:$root/build-cuda/test:$PATH"
  run=(env)
  golden="$root/tests/golden/golden_planet.safetensors"
fi

failed=0
if [ "$skip_tests" -eq 0 ]; then
  say "tests"
  tests="$("${run[@]}" gpu_test 2>&1)" || failed=1
  printf '%s\n' "$tests" >&2
  if grep -q 'SKIPPED' <<<"$tests"; then
    say "error: the driver names a GPU, but LibTorch cannot use it"
    failed=1
  fi
fi
"${PYTHON:-python3}" "$here/gpu_check.py" --run="$(printf '%q ' "${run[@]}")" --golden="$golden" "${arguments[@]}" || failed=1
[ "$failed" -eq 0 ] || say "error: not everything agrees, see above"
exit "$failed"
