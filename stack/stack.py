#!/usr/bin/env python3
"""What the service needs of a cluster, on loopback and without containers: PostgreSQL, Prometheus with
the rules, several processes of the service, and one address for all of them.

    make stack            # Ctrl-C stops all and removes their data

Needs Debian's PostgreSQL, and `prometheus` in the PATH. Standard library only. The environment sets:

    STACK_REPLICAS        processes of the service, 2
    STACK_MAX_REPLICAS    more of them, up to so many, by the rule of the demo's ScaledObject
    STACK_API_PORT        the one address's port, 8181
    STACK_ADMIN_PORT      the first process's metrics, 9464; the next ones have the ports after it
    STACK_PROMETHEUS_PORT 9090
    STACK_SERVICE         the program, target/release/order-service

Should this script be killed, its parts end as well (on Linux); their data stay in the temporary folder.

A port of 0 is any free one. ORDER_* variables reach the service, save for its addresses and its database.
"""

import asyncio
import contextlib
import json
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

from balancer import Balancer

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
PATIENCE = 60  # seconds that anything may take to start or to stop


class Failed(Exception):
    """Why the stack cannot go on."""


def setting(name, default):
    """A whole number from the environment."""
    given = os.environ.get(name, str(default))
    if not given.isdecimal():
        raise Failed(f"{name}={given!r}: expected a whole number")
    return int(given)


def port_or_free(port):
    """The port, or one that is free at the moment."""
    if port:
        return port
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


class Stack:
    """The running parts, each a process that ends with the stack."""

    def __init__(self, folder):
        self.folder = folder
        self.parts = []  # names and processes, in the order in which they were started
        self.trouble = asyncio.Queue()
        self.tasks = set()
        self.replicas = []
        self.balancer = Balancer()
        self.first_admin = setting("STACK_ADMIN_PORT", 9464)
        self.prometheus = None
        self.database = None

    def keep(self, work):
        """Runs in the background until the stack ends; its failure ends the stack."""

        async def watched():
            try:
                await work
            except Exception as failure:
                await self.trouble.put(failure)

        self.tasks.add(asyncio.create_task(watched()))

    async def spawn(self, name, *command, how=signal.SIGTERM, **options):
        """Starts a part; a Ctrl-C in the terminal reaches the stack alone. `how` is the signal that ends the
        part, which the kernel sends if the stack is killed."""
        if not shutil.which(command[0]):
            raise Failed(f"{command[0]}: not found; `make stack` installs and builds what is missing")
        if shutil.which("setpriv"):
            command = ["setpriv", "--pdeathsig", how.name.removeprefix("SIG"), *command]
        process = await asyncio.create_subprocess_exec(
            *map(str, command), start_new_session=True, stdin=asyncio.subprocess.DEVNULL, **options
        )
        self.parts.append((name, process))

        async def watch():
            code = await process.wait()
            if any(part[1] is process for part in self.parts):
                raise Failed(f"{name} ended by itself with {code}")

        self.keep(watch())
        return process

    async def stop(self, name, process, how=signal.SIGTERM):
        """Ends a part, by force if it takes too long."""
        self.parts = [part for part in self.parts if part[1] is not process]
        if process.returncode is None:
            process.send_signal(how)
            try:
                await asyncio.wait_for(process.wait(), PATIENCE)
            except asyncio.TimeoutError:
                print(f"{name} does not end: killed", file=sys.stderr)
                process.kill()
                await process.wait()

    async def start_postgres(self):
        """A server of its own, whose data lie in the stack's folder."""
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        programs = found[-1].parent if found else Path(shutil.which("initdb") or "initdb").parent
        port, password = port_or_free(0), secrets.token_urlsafe(18)
        home = self.folder / "postgres"
        home.mkdir()
        secret = home / "password"
        secret.touch(mode=0o600)
        secret.write_text(password + "\n")
        # PostgreSQL refuses to run as root; Debian's package brings the user.
        options = {}
        if os.geteuid() == 0:
            shutil.chown(home, "postgres", "postgres")
            shutil.chown(secret, "postgres", "postgres")
            options = {"user": "postgres", "group": "postgres", "extra_groups": []}

        async def once(*command, given=None):
            try:
                process = await asyncio.create_subprocess_exec(
                    *map(str, command), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT, cwd=home, **options
                )
            except FileNotFoundError:
                raise Failed(f"{command[0]}: not found; Debian's package is postgresql")
            output, _ = await process.communicate(given)
            return process.returncode, output.decode()

        data = home / "data"
        for command, given in [
            ([programs / "initdb", "-D", data, "-U", "orders", "-A", "scram-sha-256", "--pwfile", secret,
              "-E", "UTF8", "--no-locale"], None),
            ([programs / "postgres", "--single", "-D", data, "postgres"], b"CREATE DATABASE orders\n"),
        ]:
            code, output = await once(*command, given=given)
            if code:
                raise Failed(f"{command[0].name}: {output}")
        with (self.folder / "postgres.log").open("w") as log:
            process = await self.spawn(
                "PostgreSQL", programs / "postgres", "-D", data, "-p", port, "-h", HOST, "-k", "",
                how=signal.SIGINT, stdout=log, stderr=log, cwd=home, **options,
            )
        ready = [programs / "pg_isready", "-q", "-h", HOST, "-p", port, "-d", "orders"]
        await self.until("PostgreSQL", process, lambda: once(*ready), lambda answer: answer[0] == 0)
        self.database = f"postgres://orders:{password}@{HOST}:{port}/orders"
        print(f"PostgreSQL   postgres://orders@{HOST}:{port}/orders, its password in {secret}")

    async def until(self, name, process, ask, good):
        """Asks until the answer is good, the process ended or patience did."""
        end = time.monotonic() + PATIENCE
        while not good(await ask()):
            if process.returncode is not None or time.monotonic() > end:
                raise Failed(f"{name} does not start, see {self.folder}")
            await asyncio.sleep(0.05)

    async def add_replica(self):
        """One more process of the service, from its first answer on behind the one address."""
        number = len(self.replicas) + 1
        program = os.environ.get("STACK_SERVICE", ROOT / "target/release/order-service")
        admin = self.first_admin + len(self.replicas) if self.first_admin else 0
        environment = {
            # 100 ms of work an order, as in the demo; and no order before the last scrape is lost.
            "ORDER_PROCESSING_DELAY": "100ms", "ORDER_FINAL_SCRAPE_TIMEOUT": "10s",
            **os.environ,
            "ORDER_LISTEN": f"{HOST}:0", "ORDER_ADMIN_LISTEN": f"{HOST}:{admin}",
            "ORDER_LOG_FORMAT": "json", "DATABASE_URL": self.database,
            # What answers call themselves, as a pod does by its name.
            "HOSTNAME": f"replica-{number}",
        }
        name = f"replica {number}"
        process = await self.spawn(name, program, stderr=asyncio.subprocess.PIPE, env=environment)
        serving = asyncio.get_running_loop().create_future()

        async def read():
            async for line in process.stderr:
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = {"level": "ERROR", "message": line.decode().rstrip()}
                if entry.get("message") == "serving" and not serving.done():
                    serving.set_result(entry)
                elif entry.get("level") != "INFO":
                    print(f"{name}: {line.decode().rstrip()}", file=sys.stderr)
            if not serving.done():
                serving.set_exception(Failed(f"{name} does not start"))

        self.keep(read())
        entry = await asyncio.wait_for(serving, PATIENCE)
        self.replicas.append({"name": f"replica-{number}", "admin": entry["admin"]})
        self.balancer.add(entry["api"])
        self.write_targets()
        print(f"replica {number:<4} http://{entry['api']}, metrics http://{entry['admin']}/metrics")

    def write_targets(self):
        """Prometheus reads the file anew when it changes."""
        targets = [
            {"targets": [replica["admin"]], "labels": {"pod": replica["name"]}}
            for replica in self.replicas
        ]
        part = self.folder / "targets.json.new"
        part.write_text(json.dumps(targets))
        part.rename(self.folder / "targets.json")

    async def start_prometheus(self):
        """With the rules of the repository; it finds the replicas in a file."""
        port = port_or_free(setting("STACK_PROMETHEUS_PORT", 9090))
        config = {
            # Five seconds on Kubernetes; here one waits for the graphs.
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "5s"},
            "rule_files": [str(ROOT / "prometheus/rules/*.yml")],
            "scrape_configs": [{
                "job_name": "order-service",
                "file_sd_configs": [{"files": [str(self.folder / "targets.json")]}],
            }],
        }
        file = self.folder / "prometheus.yml"
        file.write_text(json.dumps(config))  # JSON is YAML.
        with (self.folder / "prometheus.log").open("w") as log:
            process = await self.spawn(
                "Prometheus", "prometheus", f"--config.file={file}", f"--web.listen-address={HOST}:{port}",
                f"--storage.tsdb.path={self.folder / 'prometheus'}", stdout=log, stderr=log,
            )
        self.prometheus = f"http://{HOST}:{port}"

        def ready():
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.prometheus}/-/ready") as answer:
                return answer.status == 200
            return False

        await self.until("Prometheus", process, lambda: asyncio.to_thread(ready), bool)
        print(f"Prometheus   {self.prometheus}")

    def orders_by_rate(self):
        """What the demo's trigger asks."""
        query = urllib.parse.urlencode({"query": "sum(rate(product_order_total[5m])) * 300"})
        with urllib.request.urlopen(f"{self.prometheus}/api/v1/query?{query}", timeout=5) as answer:
            result = json.load(answer)["data"]["result"]
        return float(result[0]["value"][1]) if result else 0.0

    async def grow(self, most):
        """As the demo's ScaledObject: each 15 s as many as orders / 20. It removes none: the window of
        five minutes would be over only long after the load."""
        while len(self.replicas) < most:
            await asyncio.sleep(15)
            try:
                orders = await asyncio.to_thread(self.orders_by_rate)
            except OSError as failure:
                print(f"Prometheus does not answer, asked again in 15 s: {failure}", file=sys.stderr)
                continue
            while len(self.replicas) < min(most, math.ceil(orders / 20)):
                await self.add_replica()

    async def stop_all(self):
        """The last first; PostgreSQL by SIGINT, which does not wait for its clients to leave."""
        self.balancer.close()
        services = [part for part in self.parts if part[0].startswith("replica")]
        await asyncio.gather(*(self.stop(*part) for part in services))
        for name, process in reversed(self.parts):
            await self.stop(name, process, signal.SIGINT)
        for task in self.tasks:
            task.cancel()


async def main():
    # A bad setting is refused before anything starts.
    for name in ("REPLICAS", "MAX_REPLICAS", "API_PORT", "ADMIN_PORT", "PROMETHEUS_PORT"):
        setting(f"STACK_{name}", 0)
    folder = Path(tempfile.mkdtemp(prefix="order-service-stack-"))
    # PostgreSQL's user must be able to enter.
    folder.chmod(0o711)
    stack = Stack(folder)
    asked = asyncio.Event()
    for wanted in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(wanted, asked.set)

    async def run():
        await stack.start_postgres()
        stack.write_targets()
        await stack.start_prometheus()
        for _ in range(setting("STACK_REPLICAS", 2)):
            await stack.add_replica()
        port = await stack.balancer.listen(HOST, setting("STACK_API_PORT", 8181))
        print(f"API          http://{HOST}:{port}, each new connection to the next replica")
        print("Ready. Ctrl-C stops all.")
        stack.keep(stack.grow(setting("STACK_MAX_REPLICAS", 0)))
        raise await stack.trouble.get()

    running = asyncio.create_task(run())
    stopping = asyncio.create_task(asked.wait())
    await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
    failure = running.exception() if running.done() else None
    running.cancel()
    await stack.stop_all()
    if failure is None:
        shutil.rmtree(folder)
        print("Stopped.")
        return 0
    print(f"{failure}\nLogs: {folder}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        sys.exit(asyncio.run(main()))
    except Failed as failure:
        sys.exit(str(failure))
