#!/usr/bin/env bash
# What one replica with one core takes: the service with one thread on one core, and order-load on the others,
# at rising rates. The thresholds of k8s/overlays/production are derived from it, see docs/scaling.md.
#
# Usage: DATABASE_URL=postgres://… bench/capacity.sh [ORDERS_PER_SECOND…]
# A PostgreSQL on the same machine takes its part of the cores, so that the rates are a lower bound; the CPU time per
# order is the service's own.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${DATABASE_URL:?a PostgreSQL of which nothing is to be kept}"
[ $# -gt 0 ] || set -- 250 500 1000 2000 4000
SECONDS_EACH=20

cargo build --release --bins
log=$(mktemp)
RUST_LOG=info taskset --cpu-list 0 target/release/order-service --worker-threads 1 --log-format json \
  --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 2>"$log" &
service=$!
trap 'kill -TERM $service 2>/dev/null; wait $service || true; rm -f "$log"' EXIT
until grep -q '"serving"' "$log"; do
  kill -0 $service || { cat "$log" >&2; exit 1; }
done
api=$(sed -n 's/.*"api":"\([^"]*\)".*/\1/p' "$log")
admin=$(sed -n 's/.*"admin":"\([^"]*\)".*/\1/p' "$log")
value() { curl -sS "http://$admin/metrics" | awk -v name="$1" '$1 == name { print $2 }'; }

echo "orders/s asked | orders/s placed | failed | p99 ms | cores used | CPU us per order"
for rate in "$@"; do
  cpu=$(value process_cpu_seconds_total)
  placed=$(value product_order_total)
  report=$(target/release/order-load --target "http://$api" --phases "${SECONDS_EACH}s@$rate" \
    --max-failures 1000000000 --json 2>/dev/null)
  python3 - "$rate" "$SECONDS_EACH" "$cpu" "$(value process_cpu_seconds_total)" "$placed" \
    "$(value product_order_total)" "$report" <<'PY'
import json, sys
rate, seconds, cpu0, cpu1, placed0, placed1 = map(float, sys.argv[1:7])
phase = json.loads(sys.argv[7])["phases"][0]
cpu, placed = cpu1 - cpu0, placed1 - placed0
p99 = phase["latency_seconds"]["p99"]
print(f"{rate:14.0f} | {placed / seconds:15.0f} | {phase['sent'] - phase['ok']:6} | {(p99 or 0) * 1e3:6.1f} | {cpu / seconds:10.2f} | {cpu / placed * 1e6:16.0f}")
PY
done
