#!/usr/bin/env bash
# Whether order-load can keep a server busy, beside h2load (gRPC) and wrk (HTTP), in one run: the
# server on one core, the client on another. Needs taskset, h2load (nghttp2-client) and wrk.
#
# busy: the part of the time in which the server ran or waited for its core, by /proc/*/schedstat, so
# that other work on the machine does not count as idleness; above 100 where two of its threads wait
# at once. µs: CPU time per answered call. RATE is what order-load tries, in orders per second: it must
# be above what the server can do, or the server rests.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in taskset h2load wrk; do
  command -v $tool >/dev/null || { echo "$tool is missing: apt-get install util-linux nghttp2-client wrk" >&2; exit 1; }
done
seconds=${SECONDS_EACH:-10}
cargo build --release --quiet --bins
bin=$PWD/target/release
dir=$(mktemp -d)
trap 'kill $server 2>/dev/null || true; rm -r "$dir"' EXIT

# The store in memory: on a disk the core waits for it, whoever the client is.
taskset -c 0 "$bin/order-service" --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 --worker-threads 1 \
  --max-in-flight 100000 --max-connection-age 0s --database-url sqlite::memory: 2>"$dir/log" &
server=$!
until grep -q serving "$dir/log"; do sleep 0.1; done
api=$(grep -o 'api=[0-9.:]*' "$dir/log" | cut -d= -f2)

# One order, as gRPC frames it: product_id "book".
printf '\0\0\0\0\006\012\004book' >"$dir/order.grpc"
cat >"$dir/order.lua" <<'LUA'
wrk.method = "POST"
wrk.path = "/product"
wrk.headers["content-type"] = "application/json"
wrk.body = '{"product_id":"book","quantity":1}'
LUA

server_time() { # nanoseconds on the core, and those and the wait for it
  cat /proc/$server/task/*/schedstat | awk '{ on += $1; wait += $2 } END { printf "%.0f %.0f\n", on, on + wait }'
}
client() { # protocol client
  case "$1 $2" in
    *order-load) "$bin/order-load" --target "http://$api" --protocol "$1" --json --seed 1 --timeout 250ms \
      --connections "$([ "$1" = grpc ] && echo 2 || echo 64)" --phases "${seconds}s@${RATE:-60000}" 2>/dev/null |
      python3 -c 'import json, sys; print(json.load(sys.stdin)["phases"][0]["ok"])' ;;
    *h2load) h2load -t 1 -c 2 -m 256 -D "$seconds" -d "$dir/order.grpc" -H 'content-type: application/grpc' \
      -H 'te: trailers' "http://$api/orders.v1.OrderService/Place" |
      awk '/^requests:/ { print $8 }' ;;
    *wrk) wrk -t 1 -c 64 -d "$seconds" -s "$dir/order.lua" "http://$api" |
      awk '/requests in/ { print $1 }' ;;
  esac
}
measure() { # protocol client
  local on0 all0 on1 all1 t0 t1 ok
  read -r on0 all0 < <(server_time)
  t0=$(date +%s%N)
  # The shell's own `time` counts the client alone: it is all that runs on the core given here.
  { TIMEFORMAT='%U %S'; time ok=$(taskset -c 1 bash -c "$(declare -f client); bin=$bin api=$api dir=$dir seconds=$seconds RATE=${RATE:-60000}; client $1 $2"); } 2>"$dir/time"
  t1=$(date +%s%N)
  read -r on1 all1 < <(server_time)
  awk -v p="$1" -v c="$2" -v ok="$ok" -v wall=$((t1 - t0)) -v on=$((on1 - on0)) -v all=$((all1 - all0)) \
    '{ printf "%-5s %-11s %9.0f %6.1f %10.1f %10.1f\n", p, c, ok / wall * 1e9, all / wall * 100, on / ok / 1e3, ($1 + $2) * 1e6 / ok }' "$dir/time"
}
printf '%-5s %-11s %9s %6s %10s %10s\n' call client 'calls/s' 'busy %' 'server µs' 'client µs'
for round in 1 2; do
  measure grpc order-load
  measure grpc h2load
  measure http order-load
  measure http wrk
done
