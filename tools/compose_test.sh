#!/usr/bin/env bash
# Shows that deploy/compose.yaml works: builds the images, starts everything, sees learning go on in the metrics of the real
# Prometheus, crashes each container, changes Redis' password, stops everything and starts it again, also from a backup. Needs
# nothing of Docker Hub; Grafana, which is not in Debian, is left out.
#
#   tools/compose_test.sh [--no-build] [--keep] [--data_root=FOLDER] [--base=IMAGE]
#
#   --no-build       takes the images that are there
#   --keep           leaves containers, volumes and the daemon running
#   --data_root=D    where a daemon that this script starts keeps images (default: a temporary folder, removed at the end)
#   --base=IMAGE     base image (default: that of deploy/.env; made with debootstrap where it cannot be pulled)
#
# Where no Docker daemon runs, one is started (as root) and stopped again. Exit code: 0 all passed, 1 something failed, 77
# Docker, its Compose plugin (2.24 or newer) or the right to start a daemon is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

SERVICES=(redis replay learner planner actor redis-exporter prometheus)
PATIENCE=300  # seconds for each step; how long it took is printed
project="orrery-test-$$"
build=1 keep=0 data_root="" base="$(sed -n 's/^BASE_IMAGE=//p' deploy/.env)"
for argument in "$@"; do
  case "$argument" in
    --no-build) build=0 ;;
    --keep) keep=1 ;;
    --data_root=*) data_root="${argument#*=}" ;;
    --base=*) base="${argument#*=}" ;;
    -h | --help) sed -n "2,15s/^# \{0,1\}//p" tools/compose_test.sh; exit 0 ;;
    *) echo "compose_test: unknown argument '$argument', see --help" >&2; exit 2 ;;
  esac
done

say() { printf 'compose_test: %4d s  %s\n' "$SECONDS" "$*"; }
die() { printf 'compose_test: error: %s\n' "$*" >&2; exit 1; }
skip() { printf 'compose_test: skipped: %s\n' "$*" >&2; exit 77; }

compose() { docker compose --project-name "$project" -f deploy/compose.yaml -f deploy/compose.test.yaml "$@"; }

work="$(mktemp -d)"
daemon=""
clean_up() {
  local status=$?
  trap - EXIT
  if [ "$status" -ne 0 ] && [ "$status" -ne 77 ]; then compose ps >&2 && compose logs --tail=15 >&2 || true; fi
  if [ "$keep" -eq 1 ]; then
    say "kept: project $project, DOCKER_HOST=${DOCKER_HOST:-}, $work"
    exit "$status"
  fi
  compose down --volumes --remove-orphans --timeout=20 >"$work/down.log" 2>&1 || true
  if [ -n "$daemon" ]; then
    kill "$daemon" && wait "$daemon" || true
  fi
  rm -rf "$work"
  exit "$status"
}
trap clean_up EXIT

start_daemon() {
  if docker info >/dev/null 2>&1; then return; fi
  command -v dockerd >/dev/null || skip "no Docker daemon runs, and dockerd is not installed (Debian: docker.io, iptables)"
  [ "$(id -u)" -eq 0 ] || skip "no Docker daemon runs, and only root can start one"
  data_root="${data_root:-$work/data}"
  export DOCKER_HOST="unix://$work/docker.sock"
  say "starting a daemon with its images in $data_root"
  setsid dockerd --data-root "$data_root" --exec-root "$work/exec" --pidfile "$work/pid" --host "$DOCKER_HOST" \
    --log-level warn >"$work/dockerd.log" 2>&1 &
  daemon=$!
  local tries
  for ((tries = 0; tries < 60; ++tries)); do
    if docker info >/dev/null 2>&1; then return; fi
    kill -0 "$daemon" 2>/dev/null || { daemon=""; tail -5 "$work/dockerd.log" >&2; skip "dockerd does not start"; }
    sleep 1
  done
  skip "dockerd does not answer after 60 s: $(tail -1 "$work/dockerd.log")"
}

# BASE_IMAGE: the base of all images.
find_base() {
  export BASE_IMAGE="$base"
  if docker image inspect "$base" >/dev/null 2>&1; then return; fi
  if timeout 120 docker pull --quiet "$base" >/dev/null 2>&1; then return; fi
  export BASE_IMAGE=orrery/test-base:bookworm
  if docker image inspect "$BASE_IMAGE" >/dev/null 2>&1; then return; fi
  command -v debootstrap >/dev/null || skip "$base cannot be pulled, and debootstrap is not installed"
  say "making the base image with debootstrap"
  debootstrap --variant=minbase bookworm "$work/root" >"$work/debootstrap.log"
  rm -rf "$work"/root/var/cache/apt/archives/*.deb "$work"/root/var/lib/apt/lists/*
  # As in Debian's own image: nothing is started while packages are installed, and they are not synced one by one.
  printf '#!/bin/sh\nexit 101\n' >"$work/root/usr/sbin/policy-rc.d"
  chmod +x "$work/root/usr/sbin/policy-rc.d"
  echo force-unsafe-io >"$work/root/etc/dpkg/dpkg.cfg.d/docker-apt-speedup"
  tar -C "$work/root" -c . | docker import - "$BASE_IMAGE" >/dev/null
  rm -rf "$work/root"
}

check_files() {
  local version file
  version="$(sed -nE 's/^project\(orrery VERSION ([0-9.]+).*/\1/p' CMakeLists.txt)"
  grep -qx "ORRERY_VERSION=$version" deploy/.env ||
    die "deploy/.env: expected ORRERY_VERSION=$version, the version of CMakeLists.txt"
  for file in docker/Dockerfile docker/test/Dockerfile; do
    grep -qx "ARG $(grep '^BASE_IMAGE=' deploy/.env)" "$file" || die "$file: expected the base image of deploy/.env"
  done
  docker compose -f deploy/compose.yaml config >"$work/config"
  docker compose -f deploy/compose.yaml -f deploy/compose.gpu.yaml --profile tools config --quiet
  COMPOSE_PROFILES="" compose config --quiet
  # What .env.example shows as defaults must be the defaults.
  sed 's/^#\([A-Z_]*=\)/\1/' .env.example | grep -v '^COMPOSE_FILE=' | cat deploy/.env - >"$work/env"
  docker compose --env-file "$work/env" -f deploy/compose.yaml config >"$work/config_of_example"
  diff "$work/config" "$work/config_of_example" >&2 || die ".env.example shows other defaults than deploy/compose.yaml has"
}

check_images() {
  local name image user label check size version epoch
  version="$(sed -n 's/^ORRERY_VERSION=//p' deploy/.env)"
  epoch="$(sed -n 's/^ARG SOURCE_DATE_EPOCH=//p' docker/Dockerfile)"
  for name in replay learner planner actor tools; do
    image="orrery/$name:$version"
    user="$(docker image inspect --format '{{.Config.User}}' "$image")"
    [ "$user" = 65532:65532 ] || die "$image runs as \"$user\": expected 65532:65532"
    label="$(docker image inspect --format '{{index .Config.Labels "org.opencontainers.image.version"}}' "$image")"
    [ "$label" = "$version" ] || die "$image has the version \"$label\" as its label: expected $version"
    check="$(docker image inspect --format '{{json .Config.Healthcheck.Test}}' "$image")"
    case "$name $check" in
      "tools [\"NONE\"]" | "$name [\"CMD\",\"orrery-$name\",\"--healthcheck\"]") ;;
      *) die "$image is asked for its health by $check" ;;
    esac
    size="$(docker image inspect --format '{{.Size}}' "$image")"
    say "$image has $((size / 1000000)) MB"
    docker run --rm --network none --user 0:0 --entrypoint find "$image" /usr/local /etc/orrery /etc/ld.so.cache -type f \
      -newermt "@$epoch" >"$work/newer"
    [ ! -s "$work/newer" ] || die "$image: $(head -1 "$work/newer") carries the time of its build: expected $epoch for all files"
  done
  for name in replay actor; do
    docker run --rm --network none --user 0:0 --entrypoint find "orrery/$name:$version" / -xdev -name 'libtorch*' >"$work/torch"
    [ ! -s "$work/torch" ] || die "orrery/$name carries LibTorch, which it does not load: $(head -1 "$work/torch")"
  done
  docker run --rm --read-only --cap-drop ALL --network none "orrery/tools:$version" doctor
  docker run --rm --read-only --cap-drop ALL --network none "orrery/tools:$version" train --help >"$work/help"
  grep -q -- --config "$work/help" || die "orrery train --help tells nothing of --config"
}

# ask QUERY: the sum that Prometheus answers; nothing where it has no such series.
ask() {
  compose exec -T prometheus promtool query instant http://127.0.0.1:9090 "$1" | sed -nE 's/^\{.*\} => ([-+.0-9eE]+) @.*/\1/p'
}

# total METRIC: its sum over what was scraped after the second `since`; Prometheus also answers with what it scraped before.
since=0
total() { ask "sum($1 and timestamp($1) > $since)"; }
rises() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a != "" && b != "" && b > a) }'; }

# Waits until updates and environment steps have both risen; a restarted process counts from anew.
await_learning() {
  local u0="" s0="" u1 s1 end=$((SECONDS + PATIENCE))
  since="$(date +%s)"
  while [ "$SECONDS" -lt "$end" ]; do
    u1="$(total orrery_learner_updates_total)" s1="$(total orrery_actor_env_steps_total)"
    if [ -z "$u0" ] || rises "$u1" "$u0"; then u0="$u1"; fi
    if [ -z "$s0" ] || rises "$s1" "$s0"; then s0="$s1"; fi
    if rises "$u0" "$u1" && rises "$s0" "$s1"; then
      say "$1: updates $u0 to $u1, environment steps $s0 to $s1"
      return
    fi
    sleep 5
  done
  die "$1: updates \"$u1\", environment steps \"$s1\": no rise of both within $PATIENCE s"
}

# Every target is scraped; Prometheus looks for containers and scrapes every 15 s.
await_targets() {
  local end=$((SECONDS + PATIENCE)) up=""
  since="$(date +%s)"
  while [ "$SECONDS" -lt "$end" ]; do
    up="$(ask "count(count by (job) (up == 1 and timestamp(up) > $since))")"
    if [ "$up" = 5 ] && [ -z "$(ask 'sum(up == 0)')" ] && [ "$(ask 'min(redis_up)')" = 1 ]; then
      say "all five jobs are scraped; rules: $(ask 'count(ALERTS) or vector(0)') alerts pending or firing"
      return
    fi
    sleep 5
  done
  die "not every target is scraped: $up of 5 jobs"
}

# The command-line tool gets into Redis.
check_tools() {
  compose run --rm -T tools replay list --store=redis://redis:6379 >"$work/list" 2>"$work/list.log" ||
    { cat "$work/list.log" >&2; die "orrery replay list failed"; }
  grep -q point_pixels "$work/list" || die "orrery replay list does not show the run: $(cat "$work/list")"
}

# Ends the first process of a container as a crash would, so that Docker's restart policy must act.
crash() {
  local id pid restarts
  id="$(compose ps --quiet "$1" | head -1)"
  read -r pid restarts < <(docker inspect --format '{{.State.Pid}} {{.RestartCount}}' "$id")
  if [ -n "$daemon" ] && grep -q "$id" "/proc/$pid/cgroup"; then
    kill -KILL "$pid"
    await_restart "$id" "$restarts" "$1"
  else  # the daemon's processes are not this machine's; Docker does not restart what it has killed itself
    docker kill "$id" >/dev/null
    docker start "$id" >/dev/null
  fi
  await_healthy "after $1 was killed"
}

# `up --wait` gives up as soon as one container is unhealthy; on a busy machine it may still become healthy.
await_healthy() {
  local end=$((SECONDS + PATIENCE))
  until compose up --detach --wait --wait-timeout 120 --no-recreate >"$work/up.log" 2>&1; do
    [ "$SECONDS" -lt "$end" ] || { cat "$work/up.log" >&2; die "$1: not healthy within $PATIENCE s"; }
    sleep 5
  done
}

# await_restart CONTAINER RESTARTS SERVICE: waits until it runs and has been restarted more often than RESTARTS.
await_restart() {
  local end=$((SECONDS + 60)) running restarts
  while true; do
    read -r running restarts < <(docker inspect --format '{{.State.Running}} {{.RestartCount}}' "$1")
    if [ "$running" = true ] && [ "$restarts" -gt "$2" ]; then return; fi
    [ "$SECONDS" -lt "$end" ] || die "$3 was killed and not restarted within 60 s"
    sleep 1
  done
}

# As docs/docker.md tells; a restarted Redis knows the new password only.
change_password() {
  local old new=new-password
  old="$(cat "$REDIS_PASSWORD_FILE")"
  printf 'acl setuser default >%s\n' "$new" |
    compose exec -T redis sh /etc/redis/with_password.sh REDISCLI_AUTH redis-cli >"$work/acl"
  [ "$(cat "$work/acl")" = OK ] || die "the new password was not accepted: $(cat "$work/acl")"
  echo "$new" >"$REDIS_PASSWORD_FILE"
  compose restart replay redis-exporter >"$work/restart.log" 2>&1
  compose restart redis >>"$work/restart.log" 2>&1
  await_healthy "after Redis' password was changed"
  if compose exec -T --env "REDISCLI_AUTH=$old" redis redis-cli -e ping >"$work/ping" 2>&1; then
    die "Redis takes the old password"
  fi
  check_secrecy
}

# Neither Docker nor the list of processes shows a password.
check_secrecy() {
  compose ps --all --quiet | xargs docker inspect >"$work/inspect"
  compose top >"$work/top"
  grep -q with_password.sh "$work/inspect" || die "docker inspect shows nothing of the containers' commands"
  if grep -E '(old|new)-password' "$work/inspect" "$work/top" >&2; then die "docker inspect or top shows the password of Redis"; fi
}

# What is there stays as it is when it is started again.
start_all() {
  await_healthy "$1"
  compose ps --all --quiet | sort >"$work/first"
  compose up --detach --wait >"$work/up.log" 2>&1 || { cat "$work/up.log" >&2; die "$1: up once more failed"; }
  compose ps --all --quiet | sort | diff "$work/first" - >&2 || die "$1: up once more made other containers"
  say "$1: all containers are healthy"
}

# SIGTERM ends the project's own services with 0, and `down` leaves nothing but the volumes.
stop_all() {
  local service id code
  compose stop >"$work/stop.log" 2>&1
  for service in replay learner planner actor; do
    for id in $(compose ps --all --quiet "$service"); do
      code="$(docker inspect --format '{{.State.ExitCode}}' "$id")"
      [ "$code" = 0 ] || die "$service ended with $code after SIGTERM: expected 0"
    done
  done
  compose down >"$work/down.log" 2>&1
  local label="label=com.docker.compose.project=$project"
  [ -z "$(docker ps --all --quiet --filter "$label")$(docker network ls --quiet --filter "$label")" ] ||
    die "containers or networks are left after down"
  [ "$(docker volume ls --quiet --filter "$label" | wc -l)" -ge 3 ] || die "volumes are gone after down"
  say "stopped with exit code 0, nothing left but volumes"
}

# As docs/docker.md says it: both volumes into files, away, and back.
bring_back_from_backup() {
  compose run --rm --no-deps -T --entrypoint tar redis -cC /data . >"$work/redis.tar" 2>"$work/tar.log"
  compose run --rm --no-deps -T --entrypoint tar learner -cC /var/lib/orrery . >"$work/learner.tar" 2>>"$work/tar.log"
  compose down --volumes >"$work/down.log" 2>&1
  compose run --rm --no-deps -T --entrypoint tar redis -xC /data <"$work/redis.tar" >>"$work/tar.log" 2>&1
  compose run --rm --no-deps -T --entrypoint tar learner -xC /var/lib/orrery <"$work/learner.tar" >>"$work/tar.log" 2>&1
  say "both volumes were saved ($(du -ch "$work"/*.tar | tail -1 | cut -f1)), deleted and brought back"
}

# resumes START: nothing that was there before is lost. Stops everything first, then does what follows START.
resumes() {
  local start="$1" before after
  shift
  before="$(total orrery_replay_steps)"
  stop_all
  "$@"
  start_all "$start"
  await_targets
  after="$(total orrery_replay_steps)"
  awk -v a="$before" -v b="$after" 'BEGIN { exit !(a > 0 && b >= a) }' ||
    die "rows $before before the stop, $after after it: expected no fewer"
  compose logs learner >"$work/learner.log" 2>&1
  grep -q 'resumed from a checkpoint' "$work/learner.log" || die "the learner did not resume from its checkpoint"
  await_learning "$start, rows $before then, $after now"
}

command -v docker >/dev/null || skip "docker is not installed"
docker compose version >/dev/null 2>&1 || skip "Docker's Compose plugin is not installed"
start_daemon
find_base
check_files
# In a folder that only its owner may enter.
export REDIS_PASSWORD_FILE="$work/redis_password"
printf '%s\n' "old-password \"'\\x 'é" >"$REDIS_PASSWORD_FILE"
chmod 644 "$REDIS_PASSWORD_FILE"
export COMPOSE_PROFILES=observability REPLAY_PORT=0 PLANNER_PORT=0 PROMETHEUS_PORT=0
if [ "$build" -eq 1 ]; then
  say "building the images from $BASE_IMAGE"
  DOCKER_BUILDKIT=1 compose --progress plain --profile tools build >"$work/build.log" 2>&1 ||
    { tail -n 30 "$work/build.log" >&2; die "the images are not built; behind a proxy that ends TLS: see docker/certs/README"; }
  say "built"
fi
check_images
start_all "first start"
await_targets
await_learning "first start"
check_tools
for service in "${SERVICES[@]}"; do
  crash "$service"
  await_learning "after $service was killed"
done
change_password
await_learning "after Redis' password was changed"
check_tools
await_targets
resumes "second start" true
resumes "start from a backup" bring_back_from_backup
say "passed"
