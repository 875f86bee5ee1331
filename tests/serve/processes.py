"""Real server processes for tests: start, wait, look inside through /metrics, and see that nothing is left behind."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(holds: Callable[[], bool], seconds: float, what: str) -> float:
    """Poll until `holds()`; returns the seconds that it took."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.02)
    return time.monotonic() - began


class ServerProcess:
    """One `saddle serve`, or what `command` names instead, on a port of its own."""

    def __init__(self, arguments: Sequence[str], command: Sequence[str] = ("-m", "saddle.cli.main", "serve"),
                 ready: bool = True, port: int | None = None) -> None:  # fmt: skip
        self.port = port or free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        descriptor, self._log = tempfile.mkstemp(suffix=".log")
        atexit.register(os.unlink, self._log)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        with os.fdopen(descriptor, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command, *arguments, "--host", "127.0.0.1", "--port", str(self.port)],
                stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
        self.known_children: list[psutil.Process] = []
        if ready:
            self.wait_ready()

    def wait_ready(self, seconds: float = START_S) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.log()}"
            return self.status("/health") == 200

        try:
            wait_for(ready, seconds, "ready")
        except AssertionError:
            self.kill()
            raise
        self.known_children = self.children()

    # talking to it -----------------------------------------------------------------------------------------------

    def status(self, path: str) -> int:
        """HTTP status of a GET, 0 when nobody listens."""
        try:
            with urllib.request.urlopen(self.base + path, timeout=5) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def post(self, path: str, body: Any, timeout: float = 60) -> tuple[int, dict[str, Any]]:
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.base + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return int(reply.status), json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def metrics(self) -> dict[str, float]:
        """Samples without histograms: `name` or `name{first label that tells}`."""
        with urllib.request.urlopen(self.base + "/metrics", timeout=5) as reply:
            page = reply.read().decode()
        found = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                tells = [v for k, v in sample.labels.items() if k in ("state", "finished_reason", "reason")]
                name = sample.name.removeprefix("saddle:")
                found[f"{name}{{{tells[0]}}}" if tells else name] = sample.value
        return found

    def wait_idle(self, seconds: float = 20) -> dict[str, float]:
        """Wait until nothing runs and no block is held; returns the metrics."""

        def idle() -> bool:
            m = self.metrics()
            whole = m["kv_cache_blocks{free}"] + m["kv_cache_blocks{cached}"] == m["kv_cache_blocks{total}"]
            return whole and m["num_requests_running"] + m["num_requests_waiting"] + m["num_requests_in_flight"] == 0

        wait_for(idle, seconds, "idle and the block pool whole")
        return self.metrics()

    def log(self) -> str:
        return Path(self._log).read_text()

    # its processes -----------------------------------------------------------------------------------------------

    def children(self) -> list[psutil.Process]:
        """All processes below it, helpers of multiprocessing included."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def engine(self) -> psutil.Process:
        """The engine process: the child that has the most memory."""
        return max(self.children(), key=lambda child: child.memory_info().rss)

    def leaves_no_process(self, seconds: float = 3.0) -> bool:
        """Whether all its children end soon: the helper of multiprocessing goes a moment after its parent."""
        wait_for(lambda: not self.orphans(), seconds, f"no process left, now {self.orphans()}")
        return True

    def orphans(self) -> list[psutil.Process]:
        """Children seen earlier that still run."""
        return [p for p in self.known_children if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.known_children = self.children() or self.known_children
            self.signal(signal.SIGTERM)
        try:
            code = self.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return code

    def kill(self) -> None:
        """End it and everything below it, whatever state it is in."""
        for child in [*self.known_children, *self.children()]:
            if child.is_running():
                child.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


def port_is_free(port: int) -> bool:
    """Whether a new server could listen on a port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def left_behind() -> set[str]:
    """Shared memory and temporary sockets on this machine, to be compared before and after."""
    found = {str(path) for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()
    return found | {str(path) for path in Path(tempfile.gettempdir()).glob("saddle*")}
