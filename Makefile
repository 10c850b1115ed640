# What one does with this repository. `make run` and `make test` are all that most need.

CARGO ?= cargo
TOOLS := $(CURDIR)/.tools

.PHONY: run load bench-load test image-test tools lint bench bench-instructions capacity bench-peers bench-growth bench-build

## Builds and starts the service on its embedded database, ./orders.db
run:
	$(CARGO) run --release --bin order-service

## The load test against a running service: make load ARGS="--phases 10s@100 --audit"
load:
	$(CARGO) run --release --bin order-load -- $(ARGS)

## PostgreSQL, Prometheus and two processes of the service on loopback, without containers; Ctrl-C stops all
.PHONY: stack
stack: tools
	$(CARGO) build --release
	PATH="$(TOOLS)/bin:$$PATH" python3 -B stack/stack.py

## A Patroni cluster that fails over under an audited load: four faults, nothing lost, nothing doubled
.PHONY: failover
failover: tools
	$(CARGO) build --release
	PATH="$(TOOLS)/bin:$$PATH" python3 -B stack/failover.py || \
	  { [ $$? = 75 ] && PATH="$(TOOLS)/bin:$$PATH" python3 -B stack/failover.py; }

## docs/dashboard.png: the dashboard's main panels after the tutorial's load test on the local stack
.PHONY: picture
picture: tools
	$(CARGO) build --release
	PATH="$(TOOLS)/bin:$$PATH" "$(TOOLS)/picture/bin/python" -B docs/picture.py

# Tests of what holds under a steady load, or within a time after a fault: each has the machine to itself.
ALONE := attacks:: cancels:: read_overload:: replicas:: load_audit:: outages:: logins:: shared_database:: the_number_that_keda_scales_on

## Installs what the tests need on a bare Debian machine and runs them all
test: tools
	PATH="$(TOOLS)/bin:$$PATH" $(CARGO) test -- --include-ignored $(ALONE:%=--skip %)
	PATH="$(TOOLS)/bin:$$PATH" $(CARGO) test --test it -- --include-ignored --test-threads 1 $(ALONE)
	bench/guard.sh

## grpcurl, promtool, Prometheus and PostgreSQL's server programs, where they are missing
tools:
	tests/install-tools.sh "$(TOOLS)"

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings

## The rates and ratios of the README, each pair measured in one run
bench:
	$(CARGO) bench --bench group_commit --bench metrics_layer --bench overload

## What one hostile peer takes from the service: each attack for 100 s, some 70 minutes in all
.PHONY: bench-attacks
bench-attacks:
	$(CARGO) bench --bench attacks

## Instructions and allocations per call of the metrics layer and its peers
bench-instructions:
	bench/instructions.sh

## Builds the Dockerfile without an engine or a registry, and runs what came out (Debian, as root)
image-test:
	tests/image-test.sh

## What one replica with one core takes, on PostgreSQL: the table of docs/scaling.md
capacity:
	bench/capacity.sh

## Whether order-load keeps a server busy, beside h2load and wrk: each on a core of its own
bench-load:
	bench/load.sh

## The service beside bare tonic, grpc-go and Go's net/http: calls, CPU per call, times, memory
bench-peers: bench-build
	bench/peers.py

## What grows with connections, callers, stored orders and replicas
bench-growth: bench-build
	bench/growth.py

# Needs Go, and of Debian: protobuf-compiler, nghttp2-client, wrk, curl.
bench-build:
	$(CARGO) build --release
	cd bench && $(CARGO) build --release --no-default-features --bin bare_tonic --bin bare_axum --bin no_store
	bench/go/build.sh bench/target/peers
