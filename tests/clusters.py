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
from contextlib import contextmanager, suppress
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
TRIES = 4  # of a node that is to join
SOON = {  # Ray's counters by the second; and when it finds that a node does not answer: else after most of a minute
    "RAY_metrics_report_interval_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}


def free_ports(count):
    """Ports that nothing has and nothing takes by itself: those of the system's choice go to any connection that is
    opened before they are used, and Ray's workers take those up to 19,999."""
    ports = []
    while len(ports) < count:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            ports += [port] if port not in ports else []
    return ports


class Hosts:
    """Network namespaces as machines: each has an address of its own on one bridge, and a link that can be cut. The
    first address is this machine's. Needs root and `ip`; raises OSError where the system allows none of this."""

    def __init__(self, count):
        self.name, number = f"pt{secrets.token_hex(3)}", secrets.randbelow(250) + 1
        self.addresses = [f"10.213.{number}.{i + 1}" for i in range(count + 1)]
        self.names = [f"{self.name}-{i}" for i in range(1, count + 1)]
        self.links = [f"{self.name}v{i}" for i in range(1, count + 1)]
        _ip("link", "add", self.name, "type", "bridge")
        _ip("addr", "add", f"{self.addresses[0]}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")
        for name, link, address in zip(self.names, self.links, self.addresses[1:], strict=True):
            _ip("netns", "add", name)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", link, "master", self.name, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")

    def titles(self, host):
        """What the processes of a host, counted from 1, call themselves."""
        found = []
        for pid in _ip("netns", "pids", self.names[host - 1]).split():
            with suppress(OSError):  # it has ended meanwhile
                found.append(Path(f"/proc/{pid}/cmdline").read_text())
        return found

    def cut(self, host):
        """The link of a host, counted from 1: nothing reaches it any more, and it goes on."""
        _ip("link", "set", self.links[host - 1], "down")

    def remove(self):
        for command in [("link", "del", self.name), *(("netns", "del", name) for name in self.names)]:
            subprocess.run(["ip", *command], stderr=subprocess.DEVNULL, check=False)


def _ip(*words):
    run = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if run.returncode:
        raise OSError(f"ip {' '.join(words)}: {run.stderr.strip()}")
    return run.stdout


class RayCluster:
    """`address` is that of its dashboard; `environment` what a client needs of the environment."""

    def __init__(self, folder, hosts=None):
        self.folder, self.nodes, self.hosts = folder, [], hosts
        self.port, dashboard, client, agent = free_ports(4)
        self.ip = hosts.addresses[0] if hosts else "127.0.0.1"
        self.address = f"http://{self.ip}:{dashboard}"
        self.token = secrets.token_hex(32)
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        ports = [f"--port={self.port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        flags = ["--head", "--num-cpus=0", "--include-dashboard=true", f"--dashboard-agent-listen-port={agent}"]
        flags += [f"--node-ip-address={self.ip}", f"--dashboard-host={self.ip}", f"--temp-dir={folder}"]
        self.start(*flags, *ports)
        assert self.comes(0), self.said()

    def start(self, *flags):
        """A node; returns its number."""
        # Its workers start as Ray starts them, and not as conftest.py's `forked_workers`.
        names = ("RAY_ADDRESS", "OMP_NUM_THREADS", "PYTHONPATH", "PALINDROME_TEST_WORKERS")
        environment = {k: v for k, v in os.environ.items() if k not in names} | self.environment
        path = f"{Path(RAY).parent}:{os.environ['PATH']}"  # a job's command begins with `python`
        environment |= {"OMP_NUM_THREADS": "1", "PATH": path, **SOON}
        log = open(Path(self.folder, f"node-{len(self.nodes)}.log"), "wb")  # noqa: SIM115
        there = ["ip", "netns", "exec", self.hosts.names[len(self.nodes) - 1]] if self.hosts and self.nodes else []
        command = [*there, RAY, "start", "--block", "--disable-usage-stats", "--include-log-monitor=false", *flags]
        pipes = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        self.nodes.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
        return len(self.nodes) - 1

    def join(self, cpus=1):
        [agent] = free_ports(1)
        flags = [f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={agent}"]
        flags += [f"--node-ip-address={self.hosts.addresses[len(self.nodes)]}"] if self.hosts else []
        for _ in range(TRIES):
            number = self.start(f"--address={self.ip}:{self.port}", *flags)
            if self.comes(number):  # two that start at once take the same names of sockets
                return number
            self.nodes.pop().wait()
        raise AssertionError(self.said())

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

    def comes(self, number):
        """Waits until a node is there; False if Ray gave up, as it does after 30 s, which a busy machine may take."""
        log = Path(self.folder, f"node-{number}.log")
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if self.nodes[number].poll() is not None:
                return False
            time.sleep(0.2)
        return True

    def said(self):
        return "".join(path.read_text(errors="replace") for path in sorted(Path(self.folder).glob("node-*.log")))


@contextmanager
def ray_cluster(nodes, apart=False):
    """A head and so many nodes, on this machine's address, or `apart` as on machines of their own (see Hosts)."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # paths of sockets have at most 107 bytes
    hosts = cluster = None
    try:
        hosts = Hosts(nodes) if apart else None
        cluster = RayCluster(folder, hosts)
        for _ in range(nodes):
            cluster.join()
        yield cluster
    finally:
        for number in reversed(range(len(cluster.nodes) if cluster else 0)):
            cluster.kill(number)
        if hosts:
            hosts.remove()
        shutil.rmtree(folder, ignore_errors=True)
