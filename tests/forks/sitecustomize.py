"""Python imports this as it starts where PYTHONPATH has this folder. A process that is to become a Ray worker has
server.py fork one that has done the imports, and stands for it: it ends as the worker ends, and the worker with it."""

import os
import sys

# Ray's own script, or what setup_worker.py is to execute, whose flags come before or after it.
WORKER = "/ray/_private/workers/default_worker.py"

if "PALINDROME_TEST_WORKERS" in os.environ and any(word.endswith(WORKER) for word in sys.orig_argv[1:4]):
    import json
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(os.environ["PALINDROME_TEST_WORKERS"])
        request = [sys.orig_argv[1:], dict(os.environ), os.getcwd(), os.readlink("/proc/self/ns/net")]
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        if server.recv(64):  # the worker's pid; without one it has to start by itself
            os._exit(int(server.recv(64) or 1) & 0xFF)
