#!/usr/bin/env bash
# Checks deploy/k8s: every overlay, and the base with every combination of components, is rendered, then held against Kubernetes'
# schemas (kubeconform), good practice (kube-score) and what the programs really take (tests/k8s_test.py).
#
#   tools/k8s_check.sh [--api-server] [--bin_dir=build/bin]
#
# --api-server: also a real kube-apiserver with its etcd must accept everything (kubectl apply --dry-run=server). Building the two
# takes some 15 minutes of one processor the first time.
#
# Needs go, python3 with venv, redis-server, promtool and the built services. What it installs goes to .cache/k8s.
set -euo pipefail
cd "$(dirname "$0")/.."

KUSTOMIZE=v5.6.0
KUBECONFORM=v0.6.7
KUBE_SCORE=v1.19.0
KUBERNETES_VALIDATE=1.37.0       # schemas of Kubernetes 1.25 to 1.37
KUBERNETES_VERSIONS=(1.30.0 1.37.0)  # the oldest that the manifests are for, and the newest
PROMETHEUS_OPERATOR=v0.79.2
KUBERNETES=1.34.2                # the API server
cache="$PWD/.cache/k8s"

say() { printf 'k8s_check: %s\n' "$*"; }
die() { printf 'k8s_check: error: %s\n' "$*" >&2; exit 1; }

api_server=0
bin_dir=build/bin
for argument in "$@"; do
  case "$argument" in
    --api-server) api_server=1 ;;
    --bin_dir=*) bin_dir="${argument#*=}" ;;
    *) die "unknown argument \"$argument\": expected --api-server or --bin_dir=FOLDER" ;;
  esac
done

install_checkers() {
  local program
  for program in go python3 redis-server promtool; do
    command -v "$program" >/dev/null || die "$program not found (tools/setup.sh installs all but go)"
  done
  mkdir -p "$cache/bin"
  go_install kustomize sigs.k8s.io/kustomize/kustomize/v5 "$KUSTOMIZE"
  go_install kubeconform github.com/yannh/kubeconform/cmd/kubeconform "$KUBECONFORM"
  go_install kube-score github.com/zegl/kube-score/cmd/kube-score "$KUBE_SCORE"
  if [ "$(cat "$cache/venv/.version" 2>/dev/null || true)" != "$KUBERNETES_VALIDATE" ]; then
    say "installing the schemas of Kubernetes"
    python3 -m venv --clear "$cache/venv"
    "$cache/venv/bin/pip" install --quiet "kubernetes-validate==$KUBERNETES_VALIDATE" PyYAML==6.0.3
    echo "$KUBERNETES_VALIDATE" >"$cache/venv/.version"
  fi
  python="$cache/venv/bin/python"
  schemas="$(echo "$cache"/venv/lib/python3*/site-packages/kubernetes_validate/kubernetes-json-schema)"
  operator="$(go mod download -json "github.com/prometheus-operator/prometheus-operator@$PROMETHEUS_OPERATOR" |
    sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')"
  crds=("$operator"/example/prometheus-operator-crd/monitoring.coreos.com_{servicemonitors,prometheusrules}.yaml)
  [ -f "${crds[0]}" ] || die "the definitions of the Prometheus operator $PROMETHEUS_OPERATOR were not found in \"$operator\""
}

# go_install PROGRAM PACKAGE VERSION
go_install() {
  [ -x "$cache/bin/$1-$3" ] && return
  say "installing $1 $3"
  GOBIN="$cache/bin" go install "$2@$3"
  mv "$cache/bin/$1" "$cache/bin/$1-$3"
}

# Writes $rendered/NAME.yaml.
render() {
  local overlay
  for overlay in deploy/k8s/overlays/*/; do
    "$cache/bin/kustomize-$KUSTOMIZE" build "$overlay" >"$rendered/$(basename "$overlay").yaml"
  done
  # Autoscaling asks for what monitoring scrapes. Single-node gives the experiment and the namespace.
  local gpu cluster watching components
  for gpu in "" gpu; do
    for cluster in "" redis-cluster; do
      for watching in "" monitoring "monitoring autoscaling"; do
        read -ra components <<<"$gpu $cluster $watching"
        render_components ${components[@]+"${components[@]}"}
      done
    done
  done
  render_components data-parallel
  render_components gpu data-parallel monitoring
}

# render_components COMPONENT…
render_components() {
  local name="single-node" component folder
  folder="$(mktemp -d "$rendered/kustomization.XXXXXX")"
  {
    printf 'apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: orrery\n'
    printf 'resources: [%s]\ncomponents:\n' "$(realpath --relative-to="$folder" deploy/k8s/overlays/single-node)"
    for component in "$@"; do
      printf -- '- %s\n' "$(realpath --relative-to="$folder" "deploy/k8s/components/$component")"
    done
  } >"$folder/kustomization.yaml"
  for component in "$@"; do name="$name+$component"; done
  "$cache/bin/kustomize-$KUSTOMIZE" build "$folder" >"$rendered/$name.yaml"
}

check_schemas() {
  local version crd
  local definitions=()
  for crd in "${crds[@]}"; do definitions+=("--crd=$crd"); done
  for version in "${KUBERNETES_VERSIONS[@]}"; do
    "$python" tools/k8s_schemas.py --out="$rendered/schemas-$version" --schemas="$schemas/v$version-local-strict" \
      "${definitions[@]}" "$rendered"/*.yaml deploy/k8s/restore.yaml
    say "kubeconform, Kubernetes $version"
    "$cache/bin/kubeconform-$KUBECONFORM" -strict -summary \
      -schema-location "$rendered/schemas-$version/{{.ResourceKind}}{{.KindSuffix}}.json" \
      "$rendered"/*.yaml deploy/k8s/restore.yaml
  done
}

check_practice() {
  local file result=0
  say "kube-score"
  for file in "$rendered"/*.yaml; do
    "$cache/bin/kube-score-$KUBE_SCORE" score --kubernetes-version v1.30 --output-format ci --exit-one-on-warning "$file" >"$rendered/score" ||
      { result=1; grep -vE '^\[(OK|SKIPPED)\]' "$rendered/score" | sed "s|^|$(basename "$file"): |" >&2; }
  done
  return $result
}

# Kubernetes' own module cannot be installed by `go install`: it replaces its parts by folders. This module replaces them by
# their releases.
build_api_server() {
  local folder="$cache/apiserver-$KUBERNETES" module
  [ -x "$folder/done" ] && return
  say "building kube-apiserver $KUBERNETES, kubectl and etcd"
  mkdir -p "$folder"
  module="$(go mod download -json "k8s.io/kubernetes@v$KUBERNETES" | sed -n 's/^\t"GoMod": "\(.*\)",$/\1/p')"
  {
    printf 'module orrery/k8s_check\n\ngo 1.24.0\n\nrequire k8s.io/kubernetes v%s\n' "$KUBERNETES"
    sed -n "s|^\t\(k8s.io/[a-z-]*\) => ./staging/.*|replace \1 => \1 v0.${KUBERNETES#*.}|p" "$module"
  } >"$folder/go.mod"
  (cd "$folder" && go build -mod=mod -o kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver &&
    go build -mod=mod -o kubectl k8s.io/kubernetes/cmd/kubectl && go build -mod=mod -o etcd go.etcd.io/etcd/server/v3)
  touch "$folder/done" && chmod +x "$folder/done"
}

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

start_api_server() {
  local folder="$cache/apiserver-$KUBERNETES" clients peers port
  clients="http://127.0.0.1:$(free_port)" peers="http://127.0.0.1:$(free_port)" port="$(free_port)"
  "$folder/etcd" --data-dir="$rendered/etcd" --listen-client-urls="$clients" --advertise-client-urls="$clients" \
    --listen-peer-urls="$peers" --initial-advertise-peer-urls="$peers" --initial-cluster="default=$peers" \
    >"$rendered/etcd.log" 2>&1 &
  servers+=($!)
  openssl genrsa -out "$rendered/key.pem" 2048 2>/dev/null
  echo 'check,admin,admin,system:masters' >"$rendered/tokens"
  # No controller makes the service accounts' tokens here, so their admission is off; pod security's is on.
  "$folder/kube-apiserver" --etcd-servers="$clients" --bind-address=127.0.0.1 --secure-port="$port" \
    --cert-dir="$rendered/certificates" --token-auth-file="$rendered/tokens" --authorization-mode=RBAC \
    --service-account-issuer=https://127.0.0.1 --service-account-key-file="$rendered/key.pem" \
    --service-account-signing-key-file="$rendered/key.pem" --service-cluster-ip-range=10.0.0.0/24 \
    --disable-admission-plugins=ServiceAccount >"$rendered/apiserver.log" 2>&1 &
  servers+=($!)
  kubectl=("$folder/kubectl" --kubeconfig=/dev/null --server="https://127.0.0.1:$port" --token=check --insecure-skip-tls-verify
    --cache-dir="$rendered/kubectl")
  local try
  for ((try = 0; try < 300; try++)); do
    if "${kubectl[@]}" get --raw /readyz >/dev/null 2>&1; then return; fi
    kill -0 "${servers[0]}" || break
    kill -0 "${servers[1]}" || break
    sleep 1
  done
  tail -n 5 "$rendered/etcd.log" "$rendered/apiserver.log" >&2
  die "the API server did not get ready"
}

# With the namespace of the file, so that its pod security standard is enforced. A warning counts as an error.
check_api_server() {
  local file
  build_api_server
  start_api_server
  for file in "${crds[@]}"; do "${kubectl[@]}" apply --server-side --filename="$file" >/dev/null; done
  "${kubectl[@]}" wait --for=condition=Established --timeout=120s customresourcedefinitions --all >/dev/null
  for file in "$rendered"/*.yaml; do
    "$python" tests/k8s_test.py --print=namespace "$file" | "${kubectl[@]}" apply --filename=- >/dev/null
    accepted --filename="$file" apply
    "$python" tests/k8s_test.py --print=pods "$file" >"$rendered/pods.json"
    accepted --filename="$rendered/pods.json" create
  done
  file=deploy/k8s/restore.yaml
  accepted --filename="$file" create --namespace=orrery
  say "kube-apiserver $KUBERNETES accepts $(find "$rendered" -maxdepth 1 -name '*.yaml' | wc -l) files and their pods"
}

# accepted --filename=FILE apply|create [arguments]
accepted() {
  if ! "${kubectl[@]}" "$2" --dry-run=server "$1" "${@:3}" >"$rendered/answer" 2>&1 || grep -q '^Warning' "$rendered/answer"; then
    cat "$rendered/answer" >&2
    die "the API server does not accept $(basename "$file")"
  fi
}

clean_up() {
  local server
  for server in ${servers[@]+"${servers[@]}"}; do
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  done
  rm -rf "$rendered"
}

servers=()
rendered="$(mktemp -d)"
trap clean_up EXIT

install_checkers
deploy/k8s/components/monitoring/make_rules.py --check
render
check_schemas
check_practice
say "what the programs take"
"$python" tests/k8s_test.py --bin_dir="$bin_dir" --cluster "$rendered"/*.yaml
[ "$api_server" -eq 0 ] || check_api_server
say "all passed"
