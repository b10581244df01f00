"""A Ray cluster of processes of its own: a head with a dashboard, nodes that come and are killed, and a token."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
READY = 90  # seconds


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class RayCluster:
    """`address` is that of its dashboard; `environment` what a client needs of the environment."""

    def __init__(self, folder):
        self.folder, self.nodes = folder, []
        self.port, dashboard, client, agent = free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.token = secrets.token_hex(32)
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        ports = [f"--port={self.port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        flags = ["--head", "--num-cpus=0", "--include-dashboard=true", f"--dashboard-agent-listen-port={agent}"]
        self.start(*flags, *ports, f"--temp-dir={folder}")
        self.wait(lambda: self.get("/api/version"), 0)

    def start(self, *flags):
        """A node; returns its number."""
        names = ("RAY_ADDRESS", "OMP_NUM_THREADS")
        environment = {k: v for k, v in os.environ.items() if k not in names} | self.environment
        path = f"{Path(RAY).parent}:{os.environ['PATH']}"  # a job's command begins with `python`
        environment |= {"OMP_NUM_THREADS": "1", "PATH": path}
        log = open(Path(self.folder, f"node-{len(self.nodes)}.log"), "wb")  # noqa: SIM115
        command = [RAY, "start", "--block", "--disable-usage-stats", *flags]
        pipes = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        self.nodes.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
        return len(self.nodes) - 1

    def join(self, cpus=1):
        [agent] = free_ports(1)
        flags = [f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={agent}"]
        before = self.alive()
        number = self.start(f"--address=127.0.0.1:{self.port}", *flags)
        self.wait(lambda: self.alive() > before, number)  # two that start at once take the same names of sockets
        return number

    def alive(self):
        """Nodes, with the head."""
        nodes = json.loads(self.get("/nodes?view=summary"))["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def metrics(self):
        """What Prometheus would read of all nodes now: name -> the sum over its labels."""
        found = Counter()
        discovery = json.loads(Path(self.folder, "prom_metrics_service_discovery.json").read_text())
        for target in {target for group in discovery for target in group["targets"]}:
            try:
                lines = urllib.request.urlopen(f"http://{target}/metrics", timeout=5).read().decode().splitlines()
            except OSError:  # a node that was killed
                continue
            for line in lines:
                if line.startswith("ray_palindrome"):
                    name, _, value = line.rpartition(" ")
                    found[name.partition("{")[0]] += float(value)
        return found

    def kill(self, number):
        """A node with all its processes, at once, as when a machine is taken."""
        if self.nodes[number].poll() is None:
            os.killpg(self.nodes[number].pid, signal.SIGKILL)
        self.nodes[number].wait()

    def get(self, path):
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        return urllib.request.urlopen(request, timeout=5).read().decode()

    def wait(self, condition, number):
        """Until a node is there."""
        until = time.monotonic() + READY
        while True:
            try:
                if condition():
                    return
            except OSError:
                pass
            assert self.nodes[number].poll() is None and time.monotonic() < until, self.said()
            time.sleep(0.2)

    def said(self):
        return "".join(path.read_text(errors="replace") for path in sorted(Path(self.folder).glob("node-*.log")))


@contextmanager
def ray_cluster(nodes):
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # paths of sockets have at most 107 bytes
    cluster = None
    try:
        cluster = RayCluster(folder)
        for _ in range(nodes):
            cluster.join()
        yield cluster
    finally:
        for number in reversed(range(len(cluster.nodes) if cluster else 0)):
            cluster.kill(number)
        shutil.rmtree(folder, ignore_errors=True)
