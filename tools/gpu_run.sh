#!/usr/bin/env bash
# Runs a program of the bundle that tools/gpu_bundle.sh made, with the bundle's libraries and a LibTorch found here.
#
#   ./run PROGRAM [argument …]      for example: ./run orrery doctor
#
# Environment: ORRERY_LIBTORCH, a folder with lib/libtorch_cuda.so (default: the package of python3, or of $PYTHON)
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
die() { printf 'run: error: %s\n' "$*" >&2; exit 1; }

[ $# -ge 1 ] || die "no program given: expected one of $(cd "$here/bin" && echo *)"
program="$here/bin/$1"
shift
[ -x "$program" ] || die "$program is missing: expected one of $(cd "$here/bin" && echo *)"

# The folder of the Python package, without importing it.
find_torch() {
  "${PYTHON:-python3}" -c 'import importlib.util as util
spec = util.find_spec("torch")
print(spec.submodule_search_locations[0] if spec else "")' 2>/dev/null || true
}
torch="${ORRERY_LIBTORCH:-$(find_torch)}"
[ -n "$torch" ] || die "LibTorch not found: python3 has no package torch; set ORRERY_LIBTORCH or PYTHON"
[ -e "$torch/lib/libtorch_cuda.so" ] || die "$torch/lib/libtorch_cuda.so is missing: expected LibTorch 2.11.0+cu130"
if [ -e "$torch/version.py" ] && ! grep -q "'2\.11\.0" "$torch/version.py"; then
  die "$torch is $(grep -m1 '^__version__' "$torch/version.py"); expected 2.11.0+cu130"
fi

# CUDA's own libraries lie beside the package.
path="$here/lib:$torch/lib"
for folder in "$torch"/../nvidia/*/lib; do
  [ ! -d "$folder" ] || path="$path:$folder"
done
export LD_LIBRARY_PATH="$path${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$program" "$@"
