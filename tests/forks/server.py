"""server.py KIND SOCKET: forks processes of a kind, `commands` of Palindrome or `workers` of Ray, that have done their
imports, which take two seconds of a core or more. It ends when its input does.

A connection to the socket, whose number that is, brings one request: [arguments, environment, folder, network
namespace], and files for 0, 1 and 2. The answer is the pid, and, when the process has ended, its exit status. A process
is killed if its connection is closed. A request is declined by closing it, where the environment has something else
that was read at the imports.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from contextlib import suppress

IMPORTS = {
    "commands": [
        "palindrome.jobs.__main__",
        *(f"palindrome.jobs.{name}" for name in ("encode", "generate", "submit")),
        "palindrome.pipeline.tasks.encode",
    ],
    # Ray reads a worker's environment as it is imported, and so does nothing here import it.
    "workers": [
        *("palindrome.model.families", "palindrome.model.engine", "palindrome.model.training"),
        *(f"palindrome.pipeline.images.{name}" for name in ("read", "metrics", "shuffle")),
        *(f"palindrome.pipeline.runs.{name}" for name in ("encoded", "summary", "status")),
        "palindrome.pipeline.storage.s3",
        *("pandas", "pyarrow.dataset", "pyarrow.parquet"),
        *("jsonschema", "pydantic", "requests", "yaml", "google.protobuf"),
    ],
}
READ = {"commands": ("PYTHON", "OMP_", "LC_", "LANG", "RAY_"), "workers": ("PYTHON", "OMP_", "LC_", "LANG")}
BREAKPOINT = "PYTHONBREAKPOINT"  # is not read by an import, and Ray sets it in a process that connects


def read_at_import(environment):
    return {k: v for k, v in environment.items() if k.startswith(READ[KIND]) and k != BREAKPOINT}


def become(arguments, environment, folder, files):
    """The forked process: ends as the command or the worker ends."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 1 << 16)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    {"commands": command, "workers": worker}[KIND](arguments)
    sys.exit()


def command(arguments):
    from palindrome.jobs.__main__ import main

    for name, value in imported.items():
        os.environ.setdefault(name, value)
    sys.argv = ["palindrome", *arguments]
    sys.orig_argv = [sys.executable, "-m", "palindrome", *arguments]  # which a command may execute anew
    sys.exit(main())


def worker(arguments):
    """What Python does with Ray's setup_worker.py and default_worker.py, or with the second alone."""
    os.setpgid(0, 0)  # Ray kills the process group of a worker that has ended
    [script] = [word for word in arguments if word.endswith("/default_worker.py")]
    context = "--serialized-runtime-env-context="
    for word in arguments:
        if word.startswith(context):
            os.environ.update(json.loads(word.removeprefix(context)).get("env_vars") or {})
    set_up = (context, "--language=")
    sys.argv = [script, *(w for w in arguments[arguments.index(script) + 1 :] if not w.startswith(set_up))]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def serve(listening):
    running, (woken, wake) = {}, os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(wake)
    network = os.readlink("/proc/self/ns/net")
    while True:
        ready, _, _ = select.select([0, woken, listening, *running.values()], [], [])
        if 0 in ready:
            break
        if woken in ready:
            os.read(woken, 4096)
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with running.pop(ended[0]) as client, suppress(OSError):
                client.send(str(os.waitstatus_to_exitcode(ended[1])).encode())
        for pid, client in running.items():
            if client in ready:
                os.kill(pid, signal.SIGKILL)
        if listening in ready:
            client, _ = listening.accept()
            request, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
            arguments, environment, folder, theirs = json.loads(request)
            if theirs == network and read_at_import(environment) == read_at_import(os.environ):
                if not (pid := os.fork()):
                    for inherited in (listening, client, *running.values()):
                        inherited.detach()  # else its end would close a file of the same number
                    become(arguments, environment, folder, files)
                running[pid] = client
                client.send(str(pid).encode())
            else:
                client.close()
            for file in files:
                os.close(file)


KIND, SOCKET = sys.argv[1], int(sys.argv[2])
before = dict(os.environ)
for name in IMPORTS[KIND]:
    importlib.import_module(name)
assert KIND == "commands" or "ray" not in sys.modules
imported = {name: value for name, value in os.environ.items() if name not in before}
gc.freeze()  # so that no process copies all of it to look for garbage
serve(socket.socket(fileno=SOCKET))
