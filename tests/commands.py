"""Palindrome's commands and Ray's workers in processes of their own that begin with all imports done: forks/server.py
forks each from a process that has done nothing but to import."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKS = ROOT / "tests/forks"


class Forks:
    """A server of forks/server.py's `kind`, within a `with`. `environment`: what its processes are to have of what is
    read at an import; they start by themselves where theirs is another."""

    def __init__(self, kind, environment):
        self._kind, self._environment, self._stack = kind, dict(environment), ExitStack()

    def __enter__(self):
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="f", dir="/tmp"))  # 107 bytes for a path
        self.address = f"{folder}/s"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            listening.bind(self.address)
            listening.listen(64)
            command = [sys.executable, FORKS / "server.py", self._kind, str(listening.fileno())]
            pipes = {"stdin": subprocess.PIPE, "pass_fds": [listening.fileno()]}
            server = subprocess.Popen(command, cwd=ROOT, env=self._environment, **pipes)
        self._stack.callback(server.wait)
        self._stack.callback(server.stdin.close)
        return self

    def __exit__(self, *_):
        self._stack.close()


class Workers(Forks):
    """`environment` is what a Ray that is to have such workers is started in."""

    def __init__(self, environment):
        super().__init__("workers", environment | {"PYTHONPATH": str(FORKS)})

    @property
    def environment(self):
        return {"PYTHONPATH": str(FORKS), "PALINDROME_TEST_WORKERS": self.address}


class Commands(Forks):
    def __init__(self, environment):
        super().__init__("commands", environment)

    def start(self, arguments, environment, folder=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE):
        """The process of `palindrome ARGUMENTS`; `stderr` is PIPE, STDOUT or a file's number, `stdin` DEVNULL or such a
        number."""
        arguments = list(map(str, arguments))
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.connect(self.address)
        out, into = os.pipe()
        errors, into_errors = os.pipe() if stderr == subprocess.PIPE else (None, stderr)
        nothing = os.open(os.devnull, os.O_RDONLY)
        pipes = [nothing if stdin == subprocess.DEVNULL else stdin, into]
        pipes += [into if stderr == subprocess.STDOUT else into_errors]
        request = [arguments, dict(environment), str(folder), os.readlink("/proc/self/ns/net")]
        socket.send_fds(server, [json.dumps(request).encode()], pipes)
        pid = server.recv(64)
        for pipe in (nothing, into, *([into_errors] if errors is not None else [])):
            os.close(pipe)
        if pid:
            return Command(int(pid), server, out, errors)
        for pipe in (out, *([errors] if errors is not None else [])):
            os.close(pipe)
        command = [sys.executable, "-m", "palindrome", *arguments]
        files = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
        return subprocess.Popen(command, cwd=folder, env=environment, **files)


class Command:
    """A process as subprocess.Popen has it: text pipes, `pid`, `returncode`."""

    def __init__(self, pid, server, stdout, stderr):
        self.pid, self.returncode, self._server = pid, None, server
        self.stdout, self.stderr = (None if pipe is None else open(pipe) for pipe in (stdout, stderr))  # noqa: SIM115
        self._said = ["", ""]

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            with self._server:
                self.returncode = int(self._server.recv(64))
        return self.returncode

    def poll(self):
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """What it prints from now on, once it has ended: (output, errors)."""
        pipes = [(i, pipe) for i, pipe in enumerate((self.stdout, self.stderr)) if pipe and not pipe.closed]

        def read(i, pipe):
            with pipe:
                self._said[i] = pipe.read()

        threads = [threading.Thread(target=read, args=pipe, daemon=True) for pipe in pipes]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join()
        return tuple(self._said)
