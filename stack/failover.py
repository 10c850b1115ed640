#!/usr/bin/env python3
"""A PostgreSQL cluster that fails over by itself, two replicas of the service on it, and a load whose every
order is audited, while the cluster suffers one fault after another.

    make failover         # two to three minutes; exit code 1 if an acknowledged order is lost or doubled

Prints for how long orders were refused at each fault: the longest time without an acknowledgement, of orders
sent every 100 ms. The environment sets:

    STACK_SERVICE         the program, target/release/order-service
    FAILOVER_LOAD         the load, target/release/order-load
    FAILOVER_RATE         its orders a second, 100
"""

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from cluster import Cluster, send
from stack import HOST, PATIENCE, ROOT, Failed, Stack, setting

PROBE = 0.1  # seconds between two orders of the probe
AFTER = 3  # seconds of undisturbed orders before and after each fault


class Probe:
    """Places an order every 100 ms through the one address; remembers when each was acknowledged."""

    def __init__(self, port):
        self.port = port
        self.acknowledged = []  # moments
        self.ids = []
        self.refused = 0

    async def run(self):
        calls = set()
        for number in itertools.count():
            call = asyncio.create_task(self.place(number))
            calls.add(call)
            call.add_done_callback(calls.discard)
            await asyncio.sleep(PROBE)

    async def place(self, number):
        body = b'{"product_id": "probe"}'
        head = (
            f"POST /product HTTP/1.1\r\nhost: {HOST}\r\nidempotency-key: probe-{number}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        answer = b""
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(HOST, self.port)
            writer.write(head.encode() + body)
            answer = await reader.read()
            writer.close()
        if re.match(rb"HTTP/1.1 20[01] ", answer):
            self.acknowledged.append(time.monotonic())
            self.ids.append(json.loads(answer.partition(b"\r\n\r\n")[2])["order_id"])
        else:
            self.refused += 1

    def gap(self, begun):
        """The longest time without an acknowledgement since then."""
        moments = [begun, *(moment for moment in self.acknowledged if moment > begun), time.monotonic()]
        return max(after - before for before, after in itertools.pairwise(moments))


async def kill_primary(cluster):
    primary, _ = await cluster.roles()
    await cluster.kill(primary)
    await cluster.until("other primary", lambda seen: cluster.leader(seen) not in (None, primary))
    await cluster.run(primary)


async def switch_over(cluster):
    primary, standby = await cluster.roles()
    await cluster.switchover(primary, standby)


async def freeze_primary(cluster):
    primary, _ = await cluster.roles()
    frozen = primary.pids()
    send(frozen, signal.SIGSTOP)
    others = [member for member in cluster.members if member is not primary]
    cluster.members.sort(key=lambda member: member is primary)  # the frozen one is asked last
    try:
        await cluster.until("other primary", lambda seen: cluster.leader(seen) in others)
        await asyncio.sleep(AFTER)
    finally:
        # It wakes as a primary that knows of no other.
        send(frozen, signal.SIGCONT)


async def kill_standby(cluster):
    _, standby = await cluster.roles()
    await cluster.kill(standby)
    await cluster.until("other standby", lambda seen: cluster.by_role(seen, "sync_standby") not in (None, standby))
    await cluster.run(standby)


FAULTS = [
    ("kill -9 of the primary", kill_primary),
    ("`patronictl switchover`", switch_over),
    ("a frozen primary (SIGSTOP), woken after the failover", freeze_primary),
    ("loss of the synchronous standby", kill_standby),
]


async def suffer(cluster, probe):
    """The faults, each on a whole cluster; prints the table's rows."""
    rows = []
    for name, fault in FAULTS:
        await cluster.until_whole()
        await asyncio.sleep(AFTER)
        begun, refused = time.monotonic(), probe.refused
        await fault(cluster)
        await cluster.until_whole()
        await asyncio.sleep(AFTER)
        seconds = probe.gap(begun)
        rows.append(f"| {name} | {seconds:.1f} s | {probe.refused - refused} |")
        print(f"{name}: no order acknowledged for {seconds:.1f} s", flush=True)
    return rows


def counted(stack):
    """What the replicas have counted, together."""
    total = 0
    for replica in stack.replicas:
        with urllib.request.urlopen(f"http://{replica['admin']}/metrics", timeout=10) as page:
            total += int(re.search(rb"^product_order_total (\d+)", page.read(), re.M)[1])
    return total


async def judge(stack, cluster, probe, load):
    """Ends the load and holds its audit, the probe and the counts against the table."""
    load.send_signal(signal.SIGINT)
    output, _ = await asyncio.wait_for(load.communicate(), 2 * PATIENCE)
    report = json.loads(output)
    audit = report["audit"]
    print(f"order-load: {json.dumps(audit)}")
    wrong = [kind for kind in ("lost", "doubled", "altered", "unread") if audit[kind]]
    ids = ",".join(f"'{one}'" for one in probe.ids)
    found = int(await cluster.sql(f"SELECT COUNT(*) FROM orders WHERE id IN ({ids})", "orders"))
    print(f"probe: {len(probe.ids)} acknowledged, {len(probe.ids) - found} lost, {probe.refused} refused")
    if found != len(probe.ids):
        wrong.append("probe's orders lost")
    doubled = int(await cluster.sql(
        "SELECT COUNT(*) - COUNT(DISTINCT idempotency_key) FROM orders", "orders"
    ))
    if doubled:
        wrong.append("doubled keys")
    end = time.monotonic() + PATIENCE
    while True:
        rows = int(await cluster.sql("SELECT COUNT(*) FROM orders", "orders"))
        counts = await asyncio.to_thread(counted, stack)
        # An order of unknown outcome is counted once its writer has looked it up.
        if rows == counts or time.monotonic() > end:
            break
        await asyncio.sleep(0.5)
    print(f"counts: {counts} counted, {rows} rows")
    if rows != counts:
        wrong.append("counts differ from rows")
    if wrong:
        raise Failed(", ".join(wrong))


async def run(stack):
    cluster = Cluster(stack)
    await cluster.start()
    stack.database = cluster.url()
    print(f"cluster: {await asyncio.to_thread(cluster.seen)}")
    for _ in range(2):
        await stack.add_replica()
    port = await stack.balancer.listen(HOST, 0)
    program = os.environ.get("FAILOVER_LOAD", ROOT / "target/release/order-load")
    phases = f"--phases=10m@{setting('FAILOVER_RATE', 100)}"
    with (stack.folder / "load.log").open("w") as log:
        load = await asyncio.create_subprocess_exec(
            str(program), f"--target=http://{HOST}:{port}", phases, "--audit", "--json",
            "--max-failures=1000000", stdout=asyncio.subprocess.PIPE, stderr=log, start_new_session=True,
        )
    try:
        probe = Probe(port)
        probing = asyncio.create_task(probe.run())
        rows = await suffer(cluster, probe)
        probing.cancel()
        await judge(stack, cluster, probe, load)
    finally:
        if load.returncode is None:
            load.kill()
        # The replicas first, so that their drain reaches the database.
        replicas = [part for part in stack.parts if part[0].startswith("replica")]
        await asyncio.gather(*(stack.stop(*part) for part in replicas))
        # The members' data go; no checkpoint is needed.
        for member in cluster.members:
            if member.process:
                await cluster.kill(member)
    print("\n| fault | orders refused for | refused of the probe's |\n|---|---|---|")
    print("\n".join(rows))


# Patroni 3.0 may refuse for ever to name a synchronous standby once a frozen leader is woken ("Synchronous replication
# key updated by someone else"). That is no fault of the service: the Makefile tries once more with a new cluster.
CLUSTER_STUCK = 75


async def main():
    folder = Path(tempfile.mkdtemp(prefix="order-service-failover-"))
    # PostgreSQL's user must be able to enter.
    folder.chmod(0o711)
    # No work of its own delays an order.
    os.environ.setdefault("ORDER_PROCESSING_DELAY", "0ms")
    os.environ.setdefault("ORDER_FINAL_SCRAPE_TIMEOUT", "0s")
    stack = Stack(folder)
    stack.first_admin = 0
    running = asyncio.create_task(run(stack))
    for wanted in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(wanted, running.cancel)
    trouble = asyncio.create_task(stack.trouble.get())
    await asyncio.wait([running, trouble], return_when=asyncio.FIRST_COMPLETED)
    try:
        if trouble.done():
            raise trouble.result()
        running.result()
    except (Exception, asyncio.CancelledError) as failure:
        running.cancel()
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await running
        await stack.stop_all()
        print(f"{str(failure) or 'interrupted'}\nLogs: {folder}", file=sys.stderr)
        return CLUSTER_STUCK if str(failure).startswith("no whole cluster") else 1
    await stack.stop_all()
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        sys.exit(asyncio.run(main()))
    except Failed as failure:
        sys.exit(str(failure))
