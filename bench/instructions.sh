#!/usr/bin/env bash
# Instructions, allocations and nanoseconds that a metrics layer adds to one call, ours and its peers
# in one run. Needs valgrind.
set -euo pipefail
cd "$(dirname "$0")"
. ./measure.sh
build --bin calls --bin allocations --bin nanoseconds

allocations=$("$bin/allocations")
nanoseconds=$("$bin/nanoseconds")
printf '%-24s %-5s %12s %8s %7s %7s %6s %6s\n' side call instructions added allocs added ns added
for protocol in grpc rest; do
  for side in unlayered bare order-service tonic_prometheus_layer axum-prometheus; do
    i=$(per_call calls "$side" "$protocol")
    a=$(of "$side" "$protocol" "$allocations")
    n=$(of "$side" "$protocol" "$nanoseconds")
    if [ "$side" = unlayered ] || [ "$side" = bare ]; then i0=$i a0=$a n0=$n; fi
    awk -v name="$side $protocol" -v i="$i" -v i0="$i0" -v a="$a" -v a0="$a0" -v n="$n" -v n0="$n0" 'BEGIN {
      split(name, of, " ")
      printf "%-24s %-5s %12d %+8d %7.3g %+7.3g %6d %+6d\n", of[1], of[2], i, i - i0, a, a - a0, n, n - n0
    }'
  done
done
