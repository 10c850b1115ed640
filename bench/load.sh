#!/usr/bin/env bash
# Whether order-load can keep a server busy, beside h2load (gRPC) and wrk (HTTP), in one run: the
# server on one core, the client on another. Needs a Rust toolchain and what it names as missing.
#
# Of the server's core: `server` is the part of the time in which the server ran on it, by its own CPU
# time; `other` the part in which anything else did, interrupts among it; `idle` the rest. On a machine that does
# nothing else, `server` of 95 and more is a busy core; elsewhere look at `idle`, which is what the client left
# unused. us: CPU time per answered call. RATE is what order-load tries, in orders per second: it must
# be above what the server can do, or the server rests. SECONDS_EACH is the length of each of eight measurements.
set -euo pipefail
cd "$(dirname "$0")/.."
missing=()
while read -r tool package; do
  command -v "$tool" >/dev/null || missing+=("$package")
done <<<'taskset util-linux
h2load nghttp2-client
wrk wrk
python3 python3
awk mawk'
[ ${#missing[@]} = 0 ] || { echo "bench/load.sh: missing: apt-get install ${missing[*]}" >&2; exit 1; }
[ "$(nproc)" -ge 2 ] || { echo "bench/load.sh: needs two cores, one for the server and one for the client" >&2; exit 1; }
seconds=${SECONDS_EACH:-10}
cargo build --release --quiet --bins
bin=$PWD/target/release
dir=$(mktemp -d)
trap 'kill $server 2>/dev/null || true; rm -r "$dir"' EXIT

# The store in memory: on a disk the core waits for it, whoever the client is.
taskset -c 0 "$bin/order-service" --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 --worker-threads 1 \
  --max-in-flight 100000 --max-connection-age 0s --database-url sqlite::memory: 2>"$dir/log" &
server=$!
until grep -q serving "$dir/log"; do
  kill -0 $server 2>/dev/null || { cat "$dir/log" >&2; exit 1; }
  sleep 0.1
done
api=$(grep -o 'api=[0-9.:]*' "$dir/log" | cut -d= -f2)

# One order, as gRPC frames it: product_id "book".
printf '\0\0\0\0\006\012\004book' >"$dir/order.grpc"
cat >"$dir/order.lua" <<'LUA'
wrk.method = "POST"
wrk.path = "/product"
wrk.headers["content-type"] = "application/json"
wrk.body = '{"product_id":"book","quantity":1}'
LUA

server_time() { # nanoseconds on the core; the server's threads live as long as it does
  cat /proc/$server/task/*/schedstat | awk '{ on += $1 } END { printf "%.0f\n", on }'
}
core_time() { # of core 0, in ticks: idle (waiting for a disk is idle, too), and all
  awk '$1 == "cpu0" { for (i = 2; i <= 9; i++) all += $i; print $5 + $6, all }' /proc/stat
}
client() { # protocol client
  case "$1 $2" in
    *order-load) "$bin/order-load" --target "http://$api" --protocol "$1" --json --seed 1 --timeout 250ms \
      --connections "$([ "$1" = grpc ] && echo 2 || echo 64)" --phases "${seconds}s@${RATE:-90000}" 2>/dev/null |
      python3 -c 'import json, sys; print(json.load(sys.stdin)["phases"][0]["ok"])' ;;
    *h2load) h2load -t 1 -c 2 -m 256 -D "$seconds" -d "$dir/order.grpc" -H 'content-type: application/grpc' \
      -H 'te: trailers' "http://$api/orders.v1.OrderService/Place" |
      awk '/^requests:/ { print $8 }' ;;
    *wrk) wrk -t 1 -c 64 -d "$seconds" -s "$dir/order.lua" "http://$api" |
      awk '/requests in/ { print $1 }' ;;
  esac
}
measure() { # protocol client
  local on0 on1 idle0 idle1 all0 all1 t0 t1 ok
  on0=$(server_time)
  read -r idle0 all0 < <(core_time)
  t0=$(date +%s%N)
  # The shell's own `time` counts the client alone: it is all that runs on the core given here.
  { TIMEFORMAT='%U %S'; time ok=$(taskset -c 1 bash -c "$(declare -f client); bin=$bin api=$api dir=$dir seconds=$seconds RATE=${RATE:-90000}; client $1 $2"); } 2>"$dir/time"
  t1=$(date +%s%N)
  on1=$(server_time)
  read -r idle1 all1 < <(core_time)
  awk -v p="$1" -v c="$2" -v ok="$ok" -v wall=$((t1 - t0)) -v on=$((on1 - on0)) \
    -v idle=$((idle1 - idle0)) -v all=$((all1 - all0)) \
    '{ served = on / wall * 100; rest = idle / all * 100; other = 100 - served - rest
       printf "%-5s %-11s %9.0f %9.1f %8.1f %7.1f %10.1f %10.1f\n", p, c, ok / wall * 1e9,
         served, other < 0 ? 0 : other, rest, on / ok / 1e3, ($1 + $2) * 1e6 / ok }' "$dir/time"
}
printf '%-5s %-11s %9s %9s %8s %7s %10s %10s\n' call client 'calls/s' 'server %' 'other %' 'idle %' 'server us' 'client us'
for round in 1 2; do
  measure grpc order-load
  measure grpc h2load
  measure http order-load
  measure http wrk
done
