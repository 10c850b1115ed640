#!/usr/bin/env bash
# Holds what a call costs against bounds.txt: instructions by callgrind and allocations, which are the
# same on every machine, where times are not. Fails beyond 5 % above a bound. Needs valgrind.
set -euo pipefail
cd "$(dirname "$0")"
. ./measure.sh
build --bin calls --bin allocations
# With what the service has of its libraries, which the other layers add to.
build --no-default-features --bin place

allocations=$("$bin/allocations" && "$bin/place")
bare_grpc=$(per_call calls bare grpc) bare_rest=$(per_call calls bare rest)
measured() { # name
  case $1 in
    layer-grpc-instructions) echo $(($(per_call calls order-service grpc) - bare_grpc)) ;;
    layer-rest-instructions) echo $(($(per_call calls order-service rest) - bare_rest)) ;;
    layer-grpc-allocations) added grpc ;;
    layer-rest-allocations) added rest ;;
    place-grpc-instructions) per_call place grpc ;;
    place-rest-instructions) per_call place rest ;;
    place-grpc-allocations) of whole grpc "$allocations" ;;
    place-rest-allocations) of whole rest "$allocations" ;;
    *) echo "guard: bounds.txt names $1, which is not measured" >&2; return 1 ;;
  esac
}
added() { # protocol
  awk -v ours="$(of order-service "$1" "$allocations")" -v bare="$(of bare "$1" "$allocations")" \
    'BEGIN { print ours - bare }'
}

failed=0
printf '%-26s %9s %9s\n' 'one call' measured bound
while read -r name bound; do
  value=$(measured "$name")
  verdict=$(awk -v value="$value" -v bound="$bound" 'BEGIN { print value <= bound * 1.05 ? "" : "TOO MUCH" }')
  printf '%-26s %9s %9s %s\n' "$name" "$value" "$bound" "$verdict"
  [ -z "$verdict" ] || failed=1
done < <(grep -v '^#' bounds.txt)
exit "$failed"
