#!/bin/sh
# Runs a command with the password of Redis in an environment variable: for programs that read no file.
#
#   with_password.sh VARIABLE COMMAND…      environment: PASSWORD_FILE; redis-cli reads REDISCLI_AUTH
set -eu
password="$(cat "$PASSWORD_FILE")"
export "$1=$password"
shift
exec "$@"
