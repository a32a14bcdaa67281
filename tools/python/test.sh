#!/usr/bin/env bash
# Installs the Python package in a virtual environment, checks its types and runs its tests.
#
#   tools/python/test.sh [pytest arguments]
#
# Environment: PYTHON (default python3), ORRERY_PYTHON_VENV (default .cache/python in the repository), ORRERY_BIN_DIR (default
# build/bin; without the programs the end-to-end tests are skipped, and pytest says so), ORRERY_REQUIRE_PROGRAMS=1 makes that
# an error.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
venv="${ORRERY_PYTHON_VENV:-$root/.cache/python}"
export ORRERY_BIN_DIR="${ORRERY_BIN_DIR:-$root/build/bin}"

if [ "${ORRERY_REQUIRE_PROGRAMS:-0}" = 1 ] && [ ! -x "$ORRERY_BIN_DIR/orrery-planner" ]; then
  echo "tools/python/test.sh: no programs in $ORRERY_BIN_DIR: build them first" >&2
  exit 1
fi
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
# Built anew each time: what an earlier build left must not be packed again.
rm -rf "$here/build"
"$venv/bin/pip" install --quiet --disable-pip-version-check --upgrade pip
"$venv/bin/pip" install --quiet --disable-pip-version-check "$here[test]"
# Only where there is a wheel: building pybullet takes long.
if ! "$venv/bin/pip" install --quiet --disable-pip-version-check --only-binary=pybullet "$here[bullet]"; then
  echo "tools/python/test.sh: pybullet cannot be installed here: THE TEST WITH HalfCheetahBulletEnv-v0 WILL BE SKIPPED" >&2
fi

# The installed package is what is checked, generated code included; from a copy, because mypy says nothing about what is
# installed.
rm -rf "$venv/check"
mkdir "$venv/check"
cd "$venv/check"
cp -r "$("$venv/bin/python" -c 'import pathlib, orrery; print(pathlib.Path(orrery.__file__).parent)')" .
"$venv/bin/mypy" --config-file="$here/pyproject.toml" --cache-dir="$venv/mypy_cache" -p orrery
cd "$here/tests"
exec "$venv/bin/python" -m pytest -c "$here/pyproject.toml" --rootdir="$here" -o cache_dir="$venv/pytest_cache" "$here/tests" "$@"
