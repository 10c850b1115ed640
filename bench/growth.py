#!/usr/bin/env python3
"""What a durable gRPC Place costs as something grows: connections, callers, stored orders, replicas.

Usage: growth.py [connections|callers|stored|replicas|scrape]. SECONDS_PER_RUN and ROUNDS set the
load, STORED the largest database, SERVER_CPUS and CLIENT_CPUS the cores, SERVICE another build of the service.
"""

import concurrent.futures
import gzip
import os
import pathlib
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

from measure import HERE, Server, free_port, output, spread, table

ROUNDS = int(os.environ.get("ROUNDS", 3))
SECONDS = int(os.environ.get("SECONDS_PER_RUN", 3))
STORED = int(os.environ.get("STORED", 10_000_000))
SERVICE = os.environ.get("SERVICE", f"{HERE}/../target/release/order-service")
PLACE = "/orders.v1.OrderService/Place"
# Wide enough that nothing is shed: a shed call is a cheap one.
FLAGS = ["--listen", "ADDRESS", "--admin-listen", "ADMIN", "--max-in-flight", "8192"]
HEAD = ["calls/s", "CPU µs/call", "p50 ms", "p99 ms", "RSS MiB"]


def service(name, url):
    return Server(name, [SERVICE, *FLAGS, "--database-url", url], PLACE)


def columns(runs):
    return [
        spread([run.rate for run in runs], 0),
        spread([run.cpu for run in runs]),
        spread([run.p50 for run in runs]),
        spread([run.p99 for run in runs]),
        f"{max(run.memory for run in runs):.0f}",
    ]


def grow(what, points, server):
    """`points` are (name, callers, connections)."""
    server.start()
    try:
        server.check()
        server.load(1, 64, 8)
        runs = {name: [] for name, _, _ in points}
        for _ in range(ROUNDS):
            for name, callers, connections in points:
                runs[name].append(server.load(SECONDS, callers, connections))
        server.tell_failed()
    finally:
        server.stop()
    table([what, *HEAD], [[name, *columns(of)] for name, of in runs.items()])


def connections(scratch):
    print("### Connections (as many callers, at least 256)\n")
    points = [(str(n), max(n, 256), n) for n in (1, 2, 8, 64, 256, 1000, 2000)]
    grow("connections", points, service("connections", f"sqlite://{scratch}/connections.db"))
    bare = [str(HERE / "target" / "release" / "bare_tonic"), "ADDRESS"]
    print("Bare tonic, which stores nothing, by the same load:\n")
    grow("connections", points, Server("bare tonic", bare, PLACE))


def callers(scratch):
    print("### Callers (over 16 connections at most)\n")
    points = [(str(n), n, min(n, 16)) for n in (1, 4, 16, 64, 256, 1024, 4096)]
    grow("callers", points, service("callers", f"sqlite://{scratch}/callers.db"))


def stored(scratch):
    print("### Orders already stored (SQLite, half of them with a key; 256 callers, 8 connections)\n")
    rows, path, there = [], f"{scratch}/stored.db", 0
    for count in sorted({0, STORED // 1000, STORED // 100, STORED // 10, STORED}):
        server = service(f"{count} orders", f"sqlite://{path}")
        if not pathlib.Path(path).exists():
            server.start().check()
            server.stop()
        fill(path, there, count)
        there = count
        server.start()
        try:
            server.check()
            server.load(1, 256, 8)
            runs = [server.load(SECONDS, 256, 8) for _ in range(ROUNDS)]
            server.tell_failed()
        finally:
            server.stop()
        rows.append([f"{count:_}".replace("_", " "), *columns(runs)])
    table(["orders", *HEAD], rows)


def fill(path, there, count):
    """Orders of the past, by SQL: ids that grow as UUIDv7 do."""
    database = sqlite3.connect(path)
    database.execute("PRAGMA synchronous = OFF")
    database.create_function("blob", 1, bytes.fromhex, deterministic=True)
    database.execute(
        """WITH RECURSIVE n(n) AS (SELECT ?1 UNION ALL SELECT n + 1 FROM n WHERE n + 1 < ?2)
        INSERT INTO orders
        SELECT blob(printf('%012x7%03x8%015x', 1600000000000 + n, n % 4096, n * 7919)), 'book', 1,
            CASE n % 2 WHEN 0 THEN 'key-' || n END, 1600000000000 + n FROM n WHERE ?1 < ?2""",
        (there, count),
    )
    database.commit()
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


def replicas(scratch):
    print("### Replicas on one PostgreSQL (64 callers, 4 connections to each)\n")
    with Postgres(scratch) as url:
        servers = [service(f"replica {n}", url) for n in range(4)]
        try:
            for server in servers:
                server.start().check()
                server.load(1, 64, 4)
            rows = []
            for count in range(1, 5):
                with concurrent.futures.ThreadPoolExecutor(count) as pool:
                    rounds = [
                        list(pool.map(lambda it: it.load(SECONDS, 64, 4), servers[:count]))
                        for _ in range(ROUNDS)
                    ]
                calls = [[run.calls for run in runs] for runs in rounds]
                cpu = [
                    sum(run.cpu * run.calls for run in runs) / sum(of)
                    for runs, of in zip(rounds, calls)
                ]
                rows.append([
                    str(count),
                    spread([sum(run.rate for run in runs) for runs in rounds], 0),
                    spread(cpu),
                    spread([statistics.median(run.p50 for run in runs) for runs in rounds]),
                    spread([max(run.p99 for run in runs) for runs in rounds]),
                    f"{max(run.memory for runs in rounds for run in runs):.0f}",
                ])
            for server in servers:
                server.tell_failed()
        finally:
            for server in servers:
                server.stop()
    table(["replicas", *HEAD], rows)


class Postgres:
    """A server of this run's own: Debian's programs, a private directory and port."""

    def __init__(self, scratch):
        self.data, self.port = f"{scratch}/postgres", free_port()
        programs = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"))
        if not programs:
            raise SystemExit("PostgreSQL's server programs are not installed (Debian: postgresql)")
        self.programs = programs[-1]
        # It refuses to run as root.
        self.prefix = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        if self.prefix:
            os.chmod(scratch, 0o755)
            output(["install", "-d", "-o", "postgres", self.data])

    def program(self, name, *words):
        words = [*self.prefix, str(self.programs / name), "-D", self.data, *words]
        subprocess.run(words, stdout=subprocess.DEVNULL, check=True)

    def __enter__(self):
        self.program("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        self.program("pg_ctl", "-w", "-l", f"{self.data}/log", "-o", options, "start")
        return f"postgres://postgres@127.0.0.1:{self.port}/postgres"

    def __exit__(self, *_):
        self.program("pg_ctl", "-w", "-m", "fast", "stop")


def scraping(scratch):
    print("### /metrics\n")
    server = service("scrape", f"sqlite://{scratch}/scrape.db").start()
    try:
        server.load(1, 64, 8)
        page, times = server.scrape(), 200
        before = server.cpu_seconds()
        for _ in range(times):
            server.scrape()
        cpu = (server.cpu_seconds() - before) / times * 1e3
        series = sum(not line.startswith("#") for line in page.splitlines())
        zipped = len(gzip.compress(page.encode()))
        print(f"{series} series, {len(page) / 1000:.0f} KB, {zipped / 1000:.0f} KB gzipped;")
        print(f"{cpu:.2f} ms of CPU for a scrape.\n")
    finally:
        server.stop()
    times, memory = [], []
    for turn in range(15):
        empty = service("empty", f"sqlite://{scratch}/empty-{turn}.db")
        times.append(first_answer(empty))
        memory.append(empty.memory())
        empty.stop()
    print(f"From the start of the process on no file to the first answered order: {spread(times)} ms,")
    print(f"and then {spread(memory)} MiB.\n")


def first_answer(server):
    """Milliseconds to the answer of a call that is tried from the start on."""
    begun = time.monotonic()
    words = [str(w) for w in server.command]
    swap = {"ADDRESS": f"127.0.0.1:{server.port}", "ADMIN": f"127.0.0.1:{server.admin}"}
    server.process = subprocess.Popen(
        [swap.get(word, word) for word in words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/product")
    while time.monotonic() - begun < 30:
        try:
            if urllib.request.urlopen(request).read() == b"Order placed!":
                return (time.monotonic() - begun) * 1e3
        except OSError:
            pass
    raise SystemExit("no answer within 30 s")


PARTS = {
    "connections": connections,
    "callers": callers,
    "stored": stored,
    "replicas": replicas,
    "scrape": scraping,
}


def main():
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as scratch:
        for name in sys.argv[1:] or PARTS:
            PARTS[name](scratch)


if __name__ == "__main__":
    main()
