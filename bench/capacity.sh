#!/usr/bin/env bash
# What one replica with one core takes: the service with one thread on one core, order-load and the database on the
# others, at rising rates. The thresholds of k8s/overlays/production are derived from it, see docs/scaling.md, whose
# table is what this prints.
#
# Usage: [DATABASE_URL=postgres://…] [SECONDS_EACH=20] bench/capacity.sh [ORDERS_PER_SECOND…]
# DATABASE_URL is a PostgreSQL of which nothing is to be kept; without it Debian's is started for the time. On the same
# machine it takes its part of the other cores, so that the rates are a lower bound; the CPU time per order is the
# service's own.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- 250 500 1000 2000 4000
SECONDS_EACH=${SECONDS_EACH:-20}

cargo build --release --bins
scratch=$(mktemp -d)
service=
database=()
end() {
  [ -z "$service" ] || { kill -TERM "$service" 2>/dev/null; wait "$service"; } || true
  [ ${#database[@]} -eq 0 ] || "${database[@]}" -w -m fast stop >/dev/null || true
  rm -rf "$scratch"
}
trap end EXIT
others=()
[ "$(nproc)" -eq 1 ] || others=(taskset --cpu-list "1-$(($(nproc --all) - 1))")

if [ -z "${DATABASE_URL:-}" ]; then
  programs=$(compgen -G '/usr/lib/postgresql/*/bin' | sort -V | tail -n 1) ||
    { echo "PostgreSQL's server programs are not installed (make tools), and DATABASE_URL is not set" >&2; exit 1; }
  as=()
  if [ "$(id -u)" = 0 ]; then # PostgreSQL refuses to run as root
    as=(runuser -u postgres --)
    chown postgres "$scratch"
  fi
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  "${as[@]}" "$programs/initdb" -D "$scratch/data" -U postgres -A trust -E UTF8 --no-locale >/dev/null
  database=("${as[@]}" "$programs/pg_ctl" -D "$scratch/data")
  "${others[@]}" "${database[@]}" -w -l "$scratch/data/log" \
    -o "-p $port -c listen_addresses=127.0.0.1 -c unix_socket_directories=" start >/dev/null
  export DATABASE_URL=postgres://postgres@127.0.0.1:$port/postgres
fi

log=$scratch/service.log
RUST_LOG=info taskset --cpu-list 0 target/release/order-service --worker-threads 1 --log-format json \
  --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 2>"$log" &
service=$!
until grep -q '"serving"' "$log"; do
  kill -0 $service 2>/dev/null || { cat "$log" >&2; exit 1; }
  sleep 0.1
done
api=$(sed -n 's/.*"api":"\([^"]*\)".*/\1/p' "$log")
admin=$(sed -n 's/.*"admin":"\([^"]*\)".*/\1/p' "$log")
value() { curl -sS "http://$admin/metrics" | awk -v name="$1" '$1 == name { print $2 }'; }

echo "$(nproc) cores, $(git rev-parse --short HEAD 2>/dev/null), load average at the start $(cut -d ' ' -f 1 /proc/loadavg):"
echo
echo "| orders/s | placed/s | failed | p99 | cores used | CPU time of the service per order | a core is full at |"
echo "|---|---|---|---|---|---|---|"
for rate in "$@"; do
  cpu=$(value process_cpu_seconds_total)
  placed=$(value product_order_total)
  report=$("${others[@]}" target/release/order-load --target "http://$api" --phases "${SECONDS_EACH}s@$rate" \
    --max-failures 1000000000 --json 2>"$scratch/load.log") || { cat "$scratch/load.log" >&2; exit 1; }
  python3 - "$rate" "$SECONDS_EACH" "$cpu" "$(value process_cpu_seconds_total)" "$placed" \
    "$(value product_order_total)" "$report" <<'PY'
import json, sys
rate, seconds, cpu0, cpu1, placed0, placed1 = map(float, sys.argv[1:7])
phase = json.loads(sys.argv[7])["phases"][0]
cpu, placed = cpu1 - cpu0, placed1 - placed0
if not placed:
    sys.exit(f"no order of {phase['sent']} was placed: {phase['failed']}")
p99 = (phase["latency_seconds"]["p99"] or 0) * 1e3
each = cpu / placed * 1e6
print(f"| {rate:.0f} | {placed / seconds:.0f} | {phase['sent'] - phase['ok']} | {p99:.1f} ms | {cpu / seconds:.2f} | {each:.0f} µs | {1e6 / each:.0f} orders/s |")
PY
done
