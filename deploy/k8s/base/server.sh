#!/bin/sh
# Starts Redis with the password that is in a file. It goes through standard input, so that no list of processes shows it.
#
#   server.sh redis-server ARGUMENTS…      environment: PASSWORD_FILE
set -eu
newline='
'
# As Redis reads a word in quotes.
password="$(sed 's/[\\"]/\\&/g' "$PASSWORD_FILE")"
case "$password" in
  "" | *"$newline"*)
    echo "server.sh: $PASSWORD_FILE has no line or several: expected the password of Redis in one line" >&2
    exit 1
    ;;
esac
exec "$@" - <<END
requirepass "$password"
masterauth "$password"
END
