#!/usr/bin/env bash
# tools/python/test.sh with every Python that the package supports, as far as they are installed.
#
#   tools/python/matrix.sh [pytest arguments]
#
# Environment: ORRERY_PYTHONS (default "3.10 3.11 3.12 3.13"; each is python3.X on the PATH or in ~/.pyenv/versions), and what
# test.sh reads but ORRERY_PYTHON_VENV: each version has its virtual environment in .cache/python3.X. The exit status is 0 only
# when all of them passed; one that is not installed has not passed.
set -uo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
cache="$(cd "$here/../.." && pwd)/.cache"

# A shim of pyenv may be there without its version: it must run.
find_python() {
  local candidate
  for candidate in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
    "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null && { echo "$candidate"; return; }
  done
  return 1
}

results=()
failed=0
for version in ${ORRERY_PYTHONS:-3.10 3.11 3.12 3.13}; do
  if ! python="$(find_python "$version")"; then
    results+=("$version not installed")
    failed=1
  elif PYTHON="$python" ORRERY_PYTHON_VENV="$cache/python$version" "$here/test.sh" "$@"; then
    results+=("$version passed")
  else
    results+=("$version FAILED")
    failed=1
  fi
done
printf 'matrix: Python %s\n' "${results[@]}"
exit "$failed"
