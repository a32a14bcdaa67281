#!/bin/sh
# Starts a node of the cluster. nodes.conf names every other node with the address it had; pods get new addresses, so after
# all of them have started anew no node would find another one. Their host names stay: each is asked for its address now. A
# node whose name is not known yet keeps the old address: it will find this one, which is enough.
#
#   start.sh FOLDER COMMAND…      environment: POD_IP, HOST_NAME (its own, as others find it)
set -eu
folder="$1"
shift
if [ -f "$folder/nodes.conf" ]; then
  # A line: ID IP:PORT@BUSPORT,HOSTNAME FLAGS …
  # shellcheck disable=SC2013
  for name in $(sed -n 's/^[0-9a-f]\{40\} [^ ,]*,\([^ ,]\{1,\}\)[ ,].*/\1/p' "$folder/nodes.conf"); do
    address="$(getent hosts "$name" | cut -d ' ' -f 1 | head -n 1)" || address=""
    [ -n "$address" ] || continue
    sed -i "s/^\([0-9a-f]\{40\}\) [^ :]*\(:[0-9]*@[0-9]*,${name}[ ,]\)/\1 $address\2/" "$folder/nodes.conf"
  done
fi
exec "$@" --cluster-announce-ip "$POD_IP" --cluster-announce-hostname "$HOST_NAME"
