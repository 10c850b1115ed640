# Sourced: how instructions and allocations of one call are measured. The instructions of a call are
# the difference of two runs, so that what starts and ends a process falls out.
bin=${CARGO_TARGET_DIR:-target}/release

build() { cargo build --release --quiet "$@"; }
instructions() { # program and its arguments
  local program=$1
  shift
  valgrind --tool=callgrind --callgrind-out-file=/dev/null "$bin/$program" "$@" 2>&1 |
    awk '/Collected/ { print $4 }'
}
per_call() { # program and its arguments but the count
  local few many
  few=$(instructions "$@" 200)
  many=$(instructions "$@" 1200)
  echo $(((many - few) / 1000))
}
# The figure of one side and protocol in lines of SIDE PROTOCOL FIGURE.
of() { awk -v side="$1" -v protocol="$2" '$1 == side && $2 == protocol { print $3 }' <<<"$3"; }
