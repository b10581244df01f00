"""S3 over HTTP, of two kinds, each in a process of its own, and a proxy that makes them as bad as a network can be.

moto honours conditional puts, as AWS does, and checks no credentials; rclone checks credentials and ignores conditions.
"""

import asyncio
import random
import runpy
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from palindrome.pipeline.storage.folder import open_fs

BIN = Path(sys.executable).parent
KEY, SECRET = "palindrome-key-id", "palindrome-secret-of-the-tests"
SOON = {"connect_timeout": 2, "read_timeout": 2, "retries": {"total_max_attempts": 6}}  # so that tests take seconds


@dataclass(frozen=True)
class Store:
    """A server, and what opens it: `options` are by protocol, as for --storage-options."""

    kind: str
    endpoint: str
    secret: str = SECRET

    @property
    def options(self):
        needed = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        config = SOON | (needed if self.kind == "rclone" else {})
        region = {"region_name": "us-east-1"}
        opened = {"endpoint_url": self.endpoint, "key": KEY, "secret": self.secret, "config_kwargs": config}
        return {"s3": {**opened, "client_kwargs": region}}

    @property
    def fs(self):
        return open_fs("s3://", self.options)[0]

    def bucket(self):
        """The URI of a new bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.fs.call_s3("create_bucket", Bucket=name)
        return f"s3://{name}"

    def through(self, proxy):
        return replace(self, endpoint=proxy.endpoint)


def free_port():
    [port] = runpy.run_path(str(Path(__file__).with_name("clusters.py")))["free_ports"](1)
    return port


@contextmanager
def _server(kind, command, port) -> Iterator[Store]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < until, f"{kind} does not start"
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.05)
        yield Store(kind, f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


def moto():
    port = free_port()
    return _server("moto", [BIN / "moto_server", "-H", "127.0.0.1", "-p", str(port)], port)


@contextmanager
def rclone(folder):
    """Keeps its objects in the folder."""
    port = free_port()
    command = [BIN / "rclone", "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"]
    try:
        with _server("rclone", [*command, "--config", "/dev/null", str(folder)], port) as store:
            yield store
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _error(status, reason, code, message):
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


ANSWERS = {
    "500": _error(500, "Internal Server Error", "InternalError", "We encountered an internal error."),
    "503": _error(503, "Slow Down", "SlowDown", "Please reduce your request rate."),
    "denied": _error(403, "Forbidden", "AccessDenied", "Access Denied"),
    "archived": _error(403, "Forbidden", "InvalidObjectState", "The operation is not valid for the storage class"),
    "expired": _error(400, "Bad Request", "ExpiredToken", "The provided token has expired."),
    "no conditions": _error(501, "Not Implemented", "NotImplemented", "A header implies what is not implemented"),
}
FAULTS = ("500", "503", "reset", "lost", "stall", "slow", "truncated")


class Proxy:
    """Between a client and a store, in a thread. Of every request it draws, from a seed, whether it goes wrong, in
    each way in turn: one of ANSWERS; the connection reset before the request is passed on, or after (its answer is
    lost); no answer for `stall` seconds; the answer's body slowly, or cut in its middle.

    `rate` and `faults` may be set at any time; so may `once`, (method, part of the path, fault) of one request, and
    `hold`: the first request with a longer body is passed on up to so many bytes and no further, `held` is set, and its
    client is waited for to go away.
    """

    def __init__(self, upstream, rate=0.0, faults=FAULTS, seed=0, stall=3.0):
        self.upstream = upstream.removeprefix("http://").split(":")
        self.rate, self.faults, self.stall = rate, faults, stall
        self.dice, self.counts, self.requests = random.Random(seed), Counter(), []
        self.wrong = 0
        self.hold, self.held, self.once = None, threading.Event(), None
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        started = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.server = asyncio.run_coroutine_threadsafe(started, self.loop).result()
        self.endpoint = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *error):
        asyncio.run_coroutine_threadsafe(self._end(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _end(self):
        self.server.close()
        requests = asyncio.all_tasks() - {asyncio.current_task()}
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)

    async def _serve(self, reader, writer):
        with suppress(OSError, EOFError, asyncio.CancelledError):
            await self._request(reader, writer)
        with suppress(OSError):
            writer.close()

    async def _request(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        assert "transfer-encoding" not in headers
        if headers.get("expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        method, path, _ = lines[0].split(" ", 2)
        self.requests.append((method, path))
        kind = "none"
        if self.dice.random() < self.rate:
            kind = self.faults[self.wrong % len(self.faults)]
            self.wrong += 1
        if self.once and method == self.once[0] and self.once[1] in path:
            kind, self.once = self.once[2], None
        if kind == "no conditions" and "if-none-match" not in headers:
            kind = "none"
        self.counts[kind] += 1
        left = int(headers.get("content-length", 0))
        if kind in ANSWERS or kind in ("reset", "stall"):
            while left:
                left -= len(await reader.read(min(left, 1 << 16)) or b"x" * left)
            await self._refuse(kind, method, writer)
            return
        up_reader, up_writer = await asyncio.open_connection(*self.upstream)
        try:
            passed = [line for line in lines if not line.lower().startswith(("connection:", "expect:"))]
            up_writer.write(("\r\n".join([*passed, "Connection: close"]) + "\r\n\r\n").encode("latin-1"))
            await self._pass(reader, up_writer, left)
            answer = await up_reader.read()
        finally:
            up_writer.close()
        await self._answer(kind, answer, writer)

    async def _refuse(self, kind, method, writer):
        if kind == "stall":
            await asyncio.sleep(self.stall)
        if kind in ANSWERS:
            head, _, body = ANSWERS[kind].partition(b"\r\n\r\n")
            writer.write(head + b"\r\n\r\n" + (b"" if method == "HEAD" else body))
            await writer.drain()
        else:
            _reset(writer)

    async def _pass(self, reader, up_writer, left):
        done, held = 0, self.hold
        while left:
            content = await reader.read(min(left, 1 << 16))
            if not content:
                up_writer.transport.abort()
                raise EOFError
            left, done = left - len(content), done + len(content)
            up_writer.write(content)
            await up_writer.drain()
            if held is not None and done >= held and left:
                self.hold = None
                self.held.set()
                while await reader.read(1 << 16):  # until its client is gone; what it sends meanwhile is lost
                    await asyncio.sleep(0.05)
                up_writer.transport.abort()
                raise EOFError

    async def _answer(self, kind, answer, writer):
        start = answer.find(b"\r\n\r\n") + 4
        body = len(answer) - start
        if kind == "lost" or (kind == "truncated" and not body):
            _reset(writer)
            return
        if kind == "truncated":
            answer = answer[: start + body // 2]
        for at in range(0, len(answer), step := max(1, len(answer) // 8 if kind == "slow" else len(answer))):
            writer.write(answer[at : at + step])
            await writer.drain()
            if kind == "slow":
                await asyncio.sleep(0.03)


def _reset(writer):
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
