#!/usr/bin/env python3
"""order-service beside its peers: the same calls, load generator and cores, by turns in one run.

Usage: peers.py [grpc|rest]. h2load drives gRPC and wrk REST; then order-load offers RATE gRPC calls a
second. ROUNDS, SECONDS_PER_RUN, CALLERS and CONNECTIONS set the load, SERVER_CPUS and CLIENT_CPUS (as
taskset takes them) the cores, SERVICE another build of the service.
"""

import os
import statistics
import sys
import tempfile

from measure import CLIENT_CPUS, HERE, SERVER_CPUS, Server, spread, table

ROUNDS = int(os.environ.get("ROUNDS", 7))
SECONDS = int(os.environ.get("SECONDS_PER_RUN", 3))
CALLERS = int(os.environ.get("CALLERS", 256))
CONNECTIONS = int(os.environ.get("CONNECTIONS", 8))
RATE = int(os.environ.get("RATE", 20_000))
SERVICE = os.environ.get("SERVICE", f"{HERE}/../target/release/order-service")
BIN = HERE / "target" / "release"
GO = HERE / "target" / "peers"
PLACE = "/orders.v1.OrderService/Place"
ADDRESSES = ["--listen", "ADDRESS", "--admin-listen", "ADMIN"]
NO_STORE = [str(BIN / "no_store"), *ADDRESSES, "--database-url", "sqlite::memory:"]
MEMORY = [SERVICE, *ADDRESSES, "--database-url", "sqlite::memory:"]


def sides(protocol, scratch):
    sqlite = [SERVICE, *ADDRESSES, "--database-url", f"sqlite://{scratch}/{protocol}.db"]
    if protocol == "grpc":
        return [
            Server("bare tonic", [str(BIN / "bare_tonic"), "ADDRESS"], PLACE),
            Server("grpc-go, Prometheus interceptors", [str(GO / "grpc-server"), *ADDRESSES], PLACE),
            Server("order-service, no store", NO_STORE, "/limit.v1.LimitService/Place"),
            Server("order-service, memory", MEMORY, PLACE),
            Server("order-service, SQLite, durable", sqlite, PLACE),
        ]
    return [
        Server("Go net/http, client_golang", [str(GO / "http-server"), *ADDRESSES], "/product"),
        Server("bare axum", [str(BIN / "bare_axum"), "ADDRESS"], "/product"),
        Server("order-service, no store", NO_STORE, "/limit"),
        Server("order-service, memory", MEMORY, "/product"),
        Server("order-service, SQLite, durable", sqlite, "/product"),
    ]


def compare(protocol, scratch):
    servers = [server.start() for server in sides(protocol, scratch)]
    try:
        for server in servers:
            server.check()
            server.load(1, CALLERS, CONNECTIONS)
        for _ in range(ROUNDS):
            for server in servers:
                server.runs.append(server.load(SECONDS, CALLERS, CONNECTIONS))
        # order-load knows the path of the contract alone.
        steady = [server for server in servers if server.path == PLACE]
        at_rate = {server.name: [] for server in steady}
        for _ in range(ROUNDS):
            for server in steady:
                at_rate[server.name].append(server.load_at(SECONDS, RATE))
        for server in servers:
            server.tell_failed()
    finally:
        for server in servers:
            server.stop()
    over = f"{CONNECTIONS} connections" if protocol == "grpc" else "a connection each"
    others = statistics.median(run.others for server in servers for run in server.runs)
    print(f"### {protocol}: {CALLERS} callers over {over}, {ROUNDS} rounds of {SECONDS} s\n")
    print(f"Server on cores {SERVER_CPUS}, load on {CLIENT_CPUS}. Median (least–most); ratios are medians")
    print(f"of the rounds' own. Taken by other programs meanwhile: {others:.0%} of the machine.\n")
    first = servers[0]
    rows = []
    for server in servers:
        runs = server.runs
        pairs = list(zip(runs, first.runs))
        rows.append([
            server.name,
            spread([run.rate for run in runs], 0),
            f"{statistics.median(a.rate / b.rate for a, b in pairs):.2f}",
            spread([run.cpu for run in runs]),
            f"{statistics.median(a.cpu / b.cpu for a, b in pairs):.2f}",
            spread([run.p50 for run in runs]),
            spread([run.p99 for run in runs]),
            f"{max(run.memory for run in runs):.0f}",
        ])
    head = ["", "calls/s", "ratio", "CPU µs/call", "ratio", "p50 ms", "p99 ms", "RSS MiB"]
    table(head, rows)
    by_name = {server.name: server for server in servers}
    ours = [name for name in by_name if name.startswith("order-service")]
    for what, of in ((name, base) for name in ours for base in by_name if base != name):
        pairs = list(zip(by_name[what].runs, by_name[of].runs))
        rate = statistics.median(a.rate / b.rate for a, b in pairs)
        cpu = statistics.median(a.cpu / b.cpu for a, b in pairs)
        print(f"{what} / {of}: {rate:.2f} of the calls/s, {cpu:.2f} of the CPU per call")
    print()
    if at_rate:
        print(f"order-load at {RATE} calls/s, times from the moment at which each call was due:\n")
        rows = [
            [name, spread([run.rate for run in runs], 0), spread([run.cpu for run in runs])]
            + [spread([run.p50 for run in runs]), spread([run.p99 for run in runs])]
            for name, runs in at_rate.items()
        ]
        table(["", "calls/s", "CPU µs/call", "p50 ms", "p99 ms"], rows)


def main():
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as scratch:
        for protocol in sys.argv[1:] or ["grpc", "rest"]:
            compare(protocol, scratch)


if __name__ == "__main__":
    main()
