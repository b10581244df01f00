"""Palindrome's commands in processes of their own that begin with all imports done: each is forked from a process that
has done nothing but to import. The imports take two seconds of a core, which is more than the rest of most commands."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
AT_IMPORT = ("RAY_", "PYTHON", "OMP_", "LC_", "LANG")  # what Ray, Python and OpenMP read once
BREAKPOINT = "PYTHONBREAKPOINT"  # is not: Ray sets it in a process that connects

# Reads from a socket a command, its environment, its folder, and its pipes; answers with the id of its process, and
# writes into the last of the pipes how that ended.
SERVER = """
import json, os, select, signal, socket, sys
before = set(os.environ)
import palindrome.jobs.encode, palindrome.jobs.generate, palindrome.jobs.submit, palindrome.pipeline.tasks.encode
from palindrome.jobs.__main__ import main

imported = {name: value for name, value in os.environ.items() if name not in before}
requests, running, (woken, wake) = socket.socket(fileno=int(sys.argv[1])), {}, os.pipe()
os.set_blocking(wake, False)
signal.signal(signal.SIGCHLD, lambda *_: None)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.set_wakeup_fd(wake)

def run(pipes, arguments, environment, folder):
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, pipe in enumerate(pipes):
        os.dup2(pipe, number)
    os.closerange(3, 1 << 16)
    os.environ.clear()
    os.environ.update(imported | environment)
    os.chdir(folder)
    sys.argv = ["palindrome", *arguments]
    sys.orig_argv = [sys.executable, "-m", "palindrome", *arguments]  # which a command may execute anew
    sys.exit(main())

while True:
    ready, _, _ = select.select([requests, woken], [], [])
    if woken in ready:
        os.read(woken, 4096)
    while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        os.write(running[ended[0]], str(os.waitstatus_to_exitcode(ended[1])).encode())
        os.close(running.pop(ended[0]))
    if requests in ready:
        content, pipes, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not content:
            break
        if not (pid := os.fork()):
            run(pipes[:3], *json.loads(content))
        for pipe in pipes[:3]:
            os.close(pipe)
        running[pid] = pipes[3]
        requests.send(str(pid).encode())
"""


class Command:
    """A process as subprocess.Popen has it: text pipes, `pid`, `returncode`."""

    def __init__(self, pid, ended, stdout, stderr):
        self.pid, self.returncode, self._ended = pid, None, ended
        self.stdout, self.stderr = (None if pipe is None else open(pipe) for pipe in (stdout, stderr))  # noqa: SIM115
        self._said = ["", ""]

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = int(os.read(self._ended, 64))
            os.close(self._ended)
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


class Commands:
    """Starts commands, within a `with`. `environment`: the variables of AT_IMPORT that most of them will have."""

    def __init__(self, environment):
        self._environment = dict(environment)

    def __enter__(self):
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-c", SERVER, str(theirs.fileno())]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "pass_fds": [theirs.fileno()]}
        self._server = subprocess.Popen(command, cwd=ROOT, env=self._environment, **pipes)
        theirs.close()
        return self

    def __exit__(self, *_):
        self._requests.close()
        self._server.wait()

    def start(self, arguments, environment, folder=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE):
        """The process of `palindrome ARGUMENTS`; `stderr` is PIPE, STDOUT or a file's number, `stdin` DEVNULL or such a
        number. It imports by itself if its environment is another in AT_IMPORT."""
        arguments = list(map(str, arguments))
        if _at_import(environment) != _at_import(self._environment):
            command = [sys.executable, "-m", "palindrome", *arguments]
            pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
            return subprocess.Popen(command, cwd=folder, env=environment, **pipes)
        out, into = os.pipe()
        errors, into_errors = os.pipe() if stderr == subprocess.PIPE else (None, stderr)
        ended, end = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        pipes = [nothing if stdin == subprocess.DEVNULL else stdin, into]
        pipes += [into if stderr == subprocess.STDOUT else into_errors, end]
        request = [arguments, dict(environment), str(folder)]
        socket.send_fds(self._requests, [json.dumps(request).encode()], pipes)
        pid = int(self._requests.recv(64))
        for pipe in (nothing, into, end, *([into_errors] if errors is not None else [])):
            os.close(pipe)
        return Command(pid, ended, out, errors)


def _at_import(environment):
    return {name: value for name, value in environment.items() if name.startswith(AT_IMPORT) and name != BREAKPOINT}
