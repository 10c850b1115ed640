"""Servers under load: started, driven by h2load or wrk, and measured from outside by /proc."""

import json
import os
import pathlib
import re
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field

HERE = pathlib.Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")
EVERY_CPU = ",".join(map(str, sorted(os.sched_getaffinity(0))))
SERVER_CPUS = os.environ.get("SERVER_CPUS", EVERY_CPU)
CLIENT_CPUS = os.environ.get("CLIENT_CPUS", EVERY_CPU)
# PlaceRequest { product_id: "book" } in gRPC's frame.
MESSAGE = b"\0\0\0\0\x06\n\x04book"
GRPC_HEADERS = ["-H", "content-type: application/grpc", "-H", "te: trailers"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Run:
    """One measured stretch of load."""

    calls: int
    rate: float  # calls per second
    cpu: float  # microseconds of the server's CPU per call
    p50: float  # milliseconds
    p99: float
    memory: float  # MiB, resident, right after
    others: float  # share of the machine's CPU taken by neither server nor load generator


@dataclass
class Server:
    """A process, and how to call it. ADDRESS and ADMIN in the command become its two addresses."""

    name: str
    command: list
    path: str
    port: int = field(default_factory=free_port)
    admin: int = field(default_factory=free_port)
    runs: list = field(default_factory=list)

    def start(self):
        words = {"ADDRESS": f"127.0.0.1:{self.port}", "ADMIN": f"127.0.0.1:{self.admin}"}
        command = ["taskset", "-c", SERVER_CPUS] + [words.get(word, word) for word in self.command]
        # taskset becomes the server, so that the pid is the server's.
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name}: {self.process.stderr.read().decode()}")
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            except OSError:
                time.sleep(0.02)
        raise SystemExit(f"{self.name}: does not listen on port {self.port}")

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            self.process.kill()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}{self.path}"

    @property
    def is_grpc(self):
        return self.path.endswith("/Place")

    def cpu_seconds(self):
        return ticks(f"/proc/{self.process.pid}/stat")

    def memory(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def check(self):
        """One call, whose answer is looked at: the load generators look at HTTP's status alone."""
        if self.is_grpc:
            with tempfile.NamedTemporaryFile() as body:
                body.write(MESSAGE)
                body.flush()
                words = ["nghttp", "-v", "-d", body.name, *GRPC_HEADERS, self.url]
                answer = output(words)
            good = re.search(r"grpc-status:.* 0\b|grpc-status: 0", answer) and "recv DATA" in answer
        else:
            answer = output(["curl", "-si", self.url])
            good = answer.endswith("Order placed!")
        if not good:
            raise SystemExit(f"{self.name}: wrong answer:\n{answer}")

    def scrape(self):
        return urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics").read().decode()

    def tell_failed(self):
        """h2load takes any answer for a success; the server counts what gRPC takes for one."""
        if "ADMIN" not in self.command:
            return
        for line in self.scrape().splitlines():
            found = re.match(r'grpc_server_handled_total.*grpc_code="(\w+)".* (\S+)$', line)
            # Canceled are calls under way as a stretch of load ends.
            if found and found[1] not in ("OK", "Canceled") and float(found[2]):
                print(f"{self.name}: {found[2]} calls ended with {found[1]}")

    def load(self, seconds, callers, connections):
        """Calls one after the other from each caller; gRPC's callers share the connections."""
        drive = h2load if self.is_grpc else wrk
        return self.measured(lambda: drive(self.url, seconds, callers, connections))

    def load_at(self, seconds, rate):
        """gRPC calls at fixed times, by order-load."""
        return self.measured(lambda: order_load(self.port, seconds, rate))

    def measured(self, drive):
        whole, cpu = machine(), self.cpu_seconds()
        loader = os.times()
        calls, rate, p50, p99 = drive()
        after = os.times()
        mine = self.cpu_seconds() - cpu
        # This process runs only while the load does not, but for reading the load generator's log.
        theirs = after.children_user + after.children_system + after.user + after.system
        theirs -= loader.children_user + loader.children_system + loader.user + loader.system
        busy, all_time = (now - then for now, then in zip(machine(), whole))
        others = max(0.0, (busy - mine - theirs) / all_time)
        return Run(calls, rate, mine / calls * 1e6, p50, p99, self.memory(), others)


def output(words, check=True):
    return subprocess.run(words, capture_output=True, errors="replace", check=check).stdout


def ticks(path):
    fields = pathlib.Path(path).read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def machine():
    """CPU seconds that the whole machine was busy, and that there were."""
    numbers = [int(n) / TICKS for n in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)


def h2load(url, seconds, callers, connections):
    connections = min(connections, callers)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        (scratch / "message").write_bytes(MESSAGE)
        words = ["h2load", "-t1", f"-D{seconds}", f"-c{connections}", f"-m{callers // connections}"]
        words += [f"--log-file={scratch}/log", "-d", f"{scratch}/message", *GRPC_HEADERS, url]
        # A machine with much else to do may let a server, or its disk, wait for all of a short run; and
        # h2load was seen to go on for minutes after the end of its time.
        for _ in range(3):
            end = ["timeout", str(seconds + 20), "taskset", "-c", CLIENT_CPUS]
            text = output([*end, *words], check=False)
            found = re.search(r"(\d+) succeeded, (\d+) failed", text)
            done, failed = found.groups() if found else (0, 0)
            if int(done):
                break
        if int(failed) or not int(done):
            raise SystemExit(f"{url}: {done} calls succeeded, {failed} failed\n{text}")
        times = sorted(int(line.rsplit("\t", 1)[1]) / 1000 for line in (scratch / "log").open())
    rate = float(re.search(r"([\d.]+) req/s", text)[1])
    return int(done), rate, times[len(times) // 2], times[len(times) * 99 // 100]


def order_load(port, seconds, rate):
    words = [str(HERE.parent / "target" / "release" / "order-load"), "--json", "--seed", "1"]
    words += ["--target", f"http://127.0.0.1:{port}", "--phases", f"{seconds}s@{rate}"]
    phase = json.loads(output(["taskset", "-c", CLIENT_CPUS, *words]))["phases"][0]
    times = phase["latency_seconds"]
    return phase["ok"], phase["ok"] / seconds, times["p50"] * 1e3, times["p99"] * 1e3


def wrk(url, seconds, callers, _connections):
    words = ["wrk", "-t1", f"-c{callers}", f"-d{seconds}s", "--latency", url]
    text = output(["taskset", "-c", CLIENT_CPUS, *words])
    if "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(f"{url}: calls failed\n{text}")
    done = int(re.search(r"(\d+) requests in", text)[1])
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])
    unit = {"us": 0.001, "ms": 1, "s": 1000}

    def percentile(which):
        number, of = re.search(rf"{which}%\s+([\d.]+)(us|ms|s)", text).groups()
        return float(number) * unit[of]

    return done, rate, percentile(50), percentile(99)


def spread(numbers, digits=1):
    """The median, and the smallest and the largest."""
    low, middle, high = min(numbers), statistics.median(numbers), max(numbers)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def table(head, rows):
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)
