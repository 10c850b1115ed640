#!/usr/bin/env python3
"""Calls that grpcio's clients lose to the age of their connections, with the message of each.

Usage: goaway.py [AGE…]; the shorter the age, the more GOAWAYs a run has. Needs grpcio: `python3 -m venv
venv && venv/bin/pip install grpcio`, then `venv/bin/python bench/goaway.py`. SECONDS_PER_RUN, CLIENTS
(processes, with a connection each) and CALLERS (of each client) set the load, SERVICE another build of
the service.
"""

import asyncio
import collections
import multiprocessing
import os
import sys
import time

import grpc

from measure import HERE, MESSAGE, Server, table

SECONDS = int(os.environ.get("SECONDS_PER_RUN", 60))
CLIENTS = int(os.environ.get("CLIENTS", 3))
CALLERS = int(os.environ.get("CALLERS", 60))
SERVICE = os.environ.get("SERVICE", f"{HERE}/../target/release/order-service")
PLACE = "/orders.v1.OrderService/Place"
FLAGS = ["--listen", "ADDRESS", "--admin-listen", "ADMIN", "--database-url", "sqlite::memory:"]


async def call(port):
    """Orders one after the other by each caller; how many calls ended in which way."""
    ended = collections.Counter()
    # Without the prefix of five bytes, which is grpcio's to add.
    message, until = MESSAGE[5:], time.monotonic() + SECONDS
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        place = channel.unary_unary(PLACE)

        async def caller():
            while time.monotonic() < until:
                try:
                    await place(message, timeout=20)
                    ended["OK"] += 1
                except grpc.aio.AioRpcError as error:
                    ended[f"{error.code().name}: {error.details()}"] += 1

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return ended


def client(port, results):
    results.put(asyncio.run(call(port)))


def run(age):
    flags = [*FLAGS, "--processing-delay", "100ms", "--max-connection-age", age]
    server = Server(age, [SERVICE, *flags], PLACE).start()
    try:
        # A client's threads do not survive a fork.
        spawn = multiprocessing.get_context("spawn")
        results = spawn.Queue()
        clients = [spawn.Process(target=client, args=(server.port, results)) for _ in range(CLIENTS)]
        for process in clients:
            process.start()
        ended = sum((results.get() for _ in clients), collections.Counter())
        for process in clients:
            process.join()
    finally:
        server.stop()
    failed = {why: count for why, count in ended.items() if why != "OK"}
    messages = "; ".join(f"{count} × {why}" for why, count in failed.items())
    return [age, str(ended.total()), str(sum(failed.values())), messages]


def main():
    print(f"{CLIENTS} × {CALLERS} callers, {SECONDS} s, 100 ms of work for each call\n")
    ages = sys.argv[1:] or ["250ms", "500ms", "2s", "5s"]
    table(["age", "calls", "failed", "messages"], [run(age) for age in ages])


if __name__ == "__main__":
    main()
