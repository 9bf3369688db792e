"""A cluster on one machine: a head without CPUs and nodes of their own, S3, MLflow on PostgreSQL, all on loopback."""

import json
import os
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos_s3 import ChaosProxy
from tests.cluster import processes
from tests.conftest import _free_port

NODES, CPUS = 3, 2
RAY = str(Path(sys.executable).with_name("ray"))
_SMALL = ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]

HEAD = "127.0.0.1"

# Ray wants its folder at one path on all nodes, and nodes that share its files clear away each other's. In a mount
# namespace of its own a node has that path and its own files there, as a machine has. The head keeps the path as it is
# seen from outside, for drivers look there for the sockets of the head's raylet.
_NAMESPACE = ["unshare", "--mount", "--propagation", "private", *(["--map-root-user"] if os.geteuid() else [])]
_WITH_OWN_DISK = [*_NAMESPACE, "sh", "-c", 'mount --bind "$1" "$2" && shift 2 && exec "$@"', "sh"]


@dataclass
class Node:
    """A raylet with its agents and workers, at an address and with folders of its own."""

    process: subprocess.Popen[bytes]
    address: str
    folder: Path


class Bed:
    """The cluster, and who uses it: `environment` is that of a person with the address and all secrets."""

    def __init__(self, folder: Path, s3: ChaosProxy, environment: dict[str, str]) -> None:
        self.folder, self.s3, self.environment = folder, s3, environment
        self._started = self._commands = 0
        self.nodes: list[Node] = []
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self._ports = [_free_port() for _ in range(4)]
        self.gcs, self.dashboard = f"127.0.0.1:{self._ports[0]}", f"http://127.0.0.1:{self._ports[1]}"

    def start_head(self) -> None:
        gcs, dashboard, client, agent = self._ports
        self.head = self._ray_start(
            "head", HEAD, "--head", "--num-cpus=0", f"--port={gcs}", "--dashboard-host=127.0.0.1",
            "--include-dashboard=true", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}",
        )  # fmt: skip
        processes.until(self._jobs_are_taken, "Ray's dashboard", self.head.process)

    def add_node(self) -> Node:
        """A node more; it is there when this returns."""
        self._started += 1
        agent = f"--dashboard-agent-listen-port={_free_port()}"
        options = [f"--address={self.gcs}", f"--num-cpus={CPUS}", agent]
        node = self._ray_start(f"node-{self._started}", f"127.0.0.{self._started + 1}", *options)
        self.nodes.append(node)
        there = lambda: any(alive["node_ip"] == node.address for alive in self.alive())  # noqa: E731
        processes.until(there, "a node", node.process)
        return node

    def kill_node(self, node: Node) -> None:
        """As a machine that loses its power: SIGKILL to the raylet and all its workers at once."""
        processes.kill(node.process)
        self.nodes.remove(node)

    def restart_head(self) -> None:
        """SIGKILL to the GCS, which keeps nothing, and to the dashboard with its jobs; then new ones, and new nodes."""
        processes.kill(self.head.process)
        # By it, and by processes of the nodes, which on a machine of its own it would not see, `ray start` takes the
        # cluster for one that still runs.
        (self.folder / "ray" / "ray_current_cluster").unlink()
        self.start_head()
        for node in self.nodes:  # they belong to a cluster that is no more
            processes.kill(node.process)
        self.nodes.clear()

    def make_whole(self) -> None:
        """As many nodes as at the start, all of them alive, and nothing in their way."""
        self.s3.calm()
        self.nodes = [node for node in self.nodes if node.process.poll() is None]
        while len(self.nodes) < NODES:
            self.add_node()
        processes.until(lambda: len(self.alive()) == NODES + 1, "a cluster without its dead nodes")

    def alive(self) -> list[dict[str, Any]]:
        """What the cluster says of the nodes that live, the head among them."""
        nodes = self.ask("/api/v0/nodes?limit=1000")["data"]["result"]["result"]
        return [node for node in nodes if node["state"] == "ALIVE"]

    def ask(self, path: str) -> Any:
        """What the dashboard answers, in JSON."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return json.load(answer)

    @contextmanager
    def ldm(self, *arguments: str, **changes: str) -> Iterator["Command"]:
        """`ldm ARGUMENTS` on the cluster, as a process that is killed at the end of the block if it still runs."""
        self._commands += 1
        log = self.folder / f"ldm-{self._commands}-{arguments[0]}.txt"
        environment = {**self.environment, "RAY_ADDRESS": self.gcs, **changes}
        command = [sys.executable, "-m", "jobs.cli", *arguments]
        report = log.with_suffix(".json")
        process = processes.start(command, log, environment, report, cwd=self.folder, start_new_session=True)
        try:
            yield Command(process, log, report)
        finally:
            if process.poll() is None:
                processes.kill(process)

    def run(self, *arguments: str, **changes: str) -> dict[str, Any]:
        """The report of `ldm ARGUMENTS --json`, which has to end well."""
        with self.ldm(*arguments, "--json", **changes) as command:
            return command.reports()

    def submit(self, *arguments: str) -> dict[str, Any]:
        """The report of `ldm submit ARGUMENTS --json`, through the Jobs API."""
        return self.run("submit", *arguments, RAY_ADDRESS=self.dashboard)

    def close(self) -> None:
        for node in [*self.nodes, self.head]:
            processes.kill(node.process)  # nothing of it is to be kept, and a good end of each takes 10 s

    def _jobs_are_taken(self) -> bool:
        try:
            return bool(self.ask("/api/version")) and bool(self.alive())
        except OSError:
            return False

    def _ray_start(self, name: str, address: str, *options: str) -> Node:
        """`ray start` with folders of its own. --block keeps what it starts below it, to be ended by its ids."""
        folder, shared = self.folder / name, self.folder / "ray"
        for made in (folder / "ray", shared):
            made.mkdir(parents=True, exist_ok=True)
        own = {"HOME": str(folder), "TMPDIR": str(folder), "LDM_CACHE": str(folder / "cache")}
        command = [RAY, "start", "--block", f"--node-ip-address={address}", f"--temp-dir={shared}", *_SMALL]
        if address != HEAD:
            command = [*_WITH_OWN_DISK, str(folder / "ray"), str(shared), *command]
        environment = {**self.environment, **own}
        process = processes.start([*command, *options], self.folder / f"{name}.log", environment, cwd=folder)
        return Node(process, address, folder)


@dataclass
class Command:
    """A run of `ldm`: what it says goes to `log`, its report to `report`."""

    process: subprocess.Popen[bytes]
    log: Path
    report: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, text: str) -> None:
        """Waits until it says `text`."""
        processes.until(lambda: text in self.said(), f"{text!r} in {self.log}", self.process)

    def ends(self, code: int = 0, wait_s: float = 240) -> str:
        """Waits for its end, which has to have this exit code; what it said."""
        found = self.process.wait(timeout=wait_s)
        assert found == code, f"exit code {found}: {self.said()[-4000:]}"
        return self.said()

    def reports(self) -> dict[str, Any]:
        """Waits for a good end; its report."""
        self.ends()
        report: dict[str, Any] = json.loads(self.report.read_text())
        return report
