#!/bin/sh
# Makes a cluster of the nodes NAME:PORT…, the first half primaries. Does nothing where there is one.
#
#   create.sh NAME:PORT…      environment: REDISCLI_AUTH
set -eu
addresses=""
for node in "$@"; do
  name="${node%:*}"
  port="${node##*:}"
  until [ "$(redis-cli -h "$name" -p "$port" ping)" = PONG ]; do
    echo "waiting for $node"
    sleep 2
  done
  # redis-cli --cluster wants addresses.
  addresses="$addresses $(getent hosts "$name" | cut -d ' ' -f 1 | head -n 1):$port"
done
name="${1%:*}"
port="${1##*:}"
if redis-cli -h "$name" -p "$port" cluster info | grep -q '^cluster_slots_assigned:16384'; then
  echo "the cluster is there"
  exit 0
fi
# shellcheck disable=SC2086
redis-cli --cluster create $addresses --cluster-replicas 1 --cluster-yes
