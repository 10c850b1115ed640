"""Three PostgreSQL servers under Patroni with etcd, on loopback: a cluster in synchronous mode that fails over
by itself. Needs Debian's packages patroni, etcd-server and postgresql."""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import time
import urllib.request
from pathlib import Path

from stack import HOST, Failed, port_or_free

PATRONI = "/usr/bin/patroni"
SWITCH = "/usr/bin/patronictl"
HEALTHY = 90  # seconds until the cluster must be whole again after a fault


def descendants(pid):
    """The process and all below it, parents first."""
    children = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            # The fields after the name, which may hold spaces: state, parent.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def send(pids, how):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)


class Member:
    """A Patroni and its PostgreSQL: what stands for a machine."""

    def __init__(self, name, folder):
        self.name = name
        self.home = folder / name
        self.port = port_or_free(0)
        self.rest = port_or_free(0)
        self.process = None

    def pids(self):
        """Patroni's, PostgreSQL's and those of its backends: the postmaster is not always Patroni's child."""
        pids = descendants(self.process.pid)
        with contextlib.suppress(OSError, ValueError, IndexError):
            postmaster = int((self.home / "data/postmaster.pid").read_text().splitlines()[0])
            pids += [pid for pid in descendants(postmaster) if pid not in pids]
        return pids


class Cluster:
    """The members and etcd, as parts of a stack."""

    def __init__(self, stack):
        self.stack = stack
        self.folder = stack.folder / "cluster"
        self.folder.mkdir()
        self.members = [Member(name, self.folder) for name in ("pg1", "pg2", "pg3")]
        self.passwords = {role: secrets.token_urlsafe(18) for role in ("postgres", "copy", "orders")}
        self.etcd = f"{HOST}:{port_or_free(0)}"
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found:
            raise Failed("initdb: not found; Debian's package is postgresql")
        self.programs = found[-1].parent
        # PostgreSQL refuses to run as root; Debian's package brings the user.
        self.options = {}
        if os.geteuid() == 0:
            self.options = {"user": "postgres", "group": "postgres", "extra_groups": []}

    def own(self, path):
        if self.options:
            shutil.chown(path, "postgres", "postgres")

    def url(self):
        """What the service is given: all hosts, and the one that takes writes is looked for."""
        hosts = ",".join(f"{HOST}:{member.port}" for member in self.members)
        password = self.passwords["orders"]
        return f"postgres://orders:{password}@{hosts}/orders?target_session_attrs=read-write"

    async def start(self):
        await self.start_etcd()
        self.own(self.folder)
        for member in self.members:
            member.home.mkdir()
            self.own(member.home)
            self.configure(member)
        # The first makes the database; the others copy it.
        await self.run(self.members[0])
        await self.until("a primary", lambda seen: self.leader(seen) is not None)
        for member in self.members[1:]:
            await self.run(member)
        await self.until_whole()
        await self.sql("CREATE ROLE orders LOGIN PASSWORD '%s'" % self.passwords["orders"])
        await self.sql("CREATE DATABASE orders OWNER orders")

    async def start_etcd(self):
        home = self.folder / "etcd"
        home.mkdir(mode=0o700)
        with (self.stack.folder / "etcd.log").open("w") as log:
            await self.stack.spawn(
                "etcd", "etcd", "--data-dir", home, "--listen-client-urls", f"http://{self.etcd}",
                "--advertise-client-urls", f"http://{self.etcd}",
                "--listen-peer-urls", f"http://{HOST}:{port_or_free(0)}", stdout=log, stderr=log,
            )

    def configure(self, member):
        """Patroni's file; JSON is YAML."""
        config = {
            "scope": "orders",
            "name": member.name,
            "restapi": {"listen": f"{HOST}:{member.rest}", "connect_address": f"{HOST}:{member.rest}"},
            "etcd3": {"host": self.etcd},
            "bootstrap": {
                "dcs": {
                    # The shortest time to live that Patroni takes: how long a dead primary is waited for.
                    "ttl": 20, "loop_wait": 2, "retry_timeout": 4, "synchronous_mode": True,
                    # A crashed primary is replaced, not waited for.
                    "primary_start_timeout": 0,
                    "postgresql": {"use_pg_rewind": True, "parameters": {"max_connections": 60}},
                },
                "initdb": ["data-checksums", {"encoding": "UTF8"}, {"locale": "C"}],
                "pg_hba": [
                    "host all all 127.0.0.1/32 scram-sha-256",
                    "host replication all 127.0.0.1/32 scram-sha-256",
                ],
            },
            "postgresql": {
                "listen": f"{HOST}:{member.port}", "connect_address": f"{HOST}:{member.port}",
                "data_dir": str(member.home / "data"), "bin_dir": str(self.programs),
                "pgpass": str(member.home / "pgpass"),
                "parameters": {"unix_socket_directories": "", "shared_buffers": "32MB"},
                "authentication": {
                    "superuser": {"username": "postgres", "password": self.passwords["postgres"]},
                    "replication": {"username": "copy", "password": self.passwords["copy"]},
                },
            },
        }
        file = member.home / "patroni.json"
        file.touch(mode=0o600)
        self.own(file)
        file.write_text(json.dumps(config))

    async def run(self, member):
        """Starts a member, or starts it again after it was killed."""
        with (self.stack.folder / f"{member.name}.log").open("a") as log:
            member.process = await self.stack.spawn(
                member.name, PATRONI, member.home / "patroni.json", stdout=log, stderr=log,
                cwd=member.home, **self.options,
            )

    async def kill(self, member):
        """kill -9 of everything on the machine, Patroni first, so that it restarts nothing."""
        self.stack.parts = [part for part in self.stack.parts if part[1] is not member.process]
        send(member.pids(), signal.SIGKILL)
        await member.process.wait()

    async def switchover(self, old, new):
        process = await asyncio.create_subprocess_exec(
            SWITCH, "-c", old.home / "patroni.json", "switchover", "orders",
            "--master", old.name, "--candidate", new.name, "--force",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        if process.returncode or b"Successfully switched" not in output:
            raise Failed(f"patronictl switchover: {output.decode()}")

    def seen(self):
        """Role and state of each member, as the first that answers has them."""
        for member in self.members:
            with contextlib.suppress(OSError, ValueError):
                url = f"http://{HOST}:{member.rest}/cluster"
                with urllib.request.urlopen(url, timeout=1) as answer:
                    members = json.load(answer)["members"]
                return {one["name"]: (one["role"], one["state"]) for one in members}
        return {}

    def leader(self, seen):
        return self.by_role(seen, "leader")

    def by_role(self, seen, role):
        for member in self.members:
            if seen.get(member.name, ("", ""))[0] == role:
                return member
        return None

    async def roles(self):
        """The primary and its synchronous standby."""
        seen = await asyncio.to_thread(self.seen)
        return self.leader(seen), self.by_role(seen, "sync_standby")

    async def until(self, what, good):
        end = time.monotonic() + HEALTHY
        while not good(seen := await asyncio.to_thread(self.seen)):
            if time.monotonic() > end:
                raise Failed(f"no {what} within {HEALTHY} s: {seen}")
            await asyncio.sleep(0.2)

    async def until_whole(self):
        """A primary, a synchronous standby and the third member, all of them running."""

        def whole(seen):
            states = {state for _, state in seen.values()}
            roles = sorted(role for role, _ in seen.values())
            return roles == ["leader", "replica", "sync_standby"] and states <= {"running", "streaming"}

        await self.until("whole cluster", whole)

    async def sql(self, statement, database="postgres"):
        """What psql prints for a statement on the primary."""
        leader, _ = await self.roles()
        process = await asyncio.create_subprocess_exec(
            self.programs / "psql", "-XAtq", "-h", HOST, "-p", str(leader.port), "-U", "postgres",
            "-v", "ON_ERROR_STOP=1", database, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PGPASSWORD": self.passwords["postgres"]},
        )
        output, _ = await process.communicate(statement.encode())
        if process.returncode:
            raise Failed(f"{statement.split('PASSWORD')[0]}: {output.decode()}")
        return output.decode().strip()
