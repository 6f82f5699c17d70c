"""Object stores and web servers on this machine that fail as those elsewhere do: moto's server for S3, files in memory for the web.

Whatever is asked for goes through a real socket. Which request fails how is said by a plan, so that a run can be repeated.
"""

import _socket
import http.client
import os
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "dummy", "AWS_SECRET_ACCESS_KEY": "SECRETKEY", "AWS_EC2_METADATA_DISABLED": "true"}
KEYS |= {"AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
FAULTS = ("slow-down", "too-many", "error", "drop", "short", "reset")


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class Request(NamedTuple):
    number: int
    method: str
    path: str
    headers: Mapping[str, str]


Plan = Callable[[Request], "str | Answer | None"]
Origin = Callable[[Request, bytes], Answer]


def s3_error(status: int, code: str, **headers: str) -> Answer:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    return Answer(status, {"Content-Type": "application/xml", **headers}, body)


def files_of(content: Mapping[str, bytes], **headers: str) -> Origin:
    """A web server that has these files, and gives parts of them."""

    def answer(request: Request, _: bytes) -> Answer:
        data = content.get(request.path.split("?")[0])
        if data is None:
            return Answer(404, {}, b"no such file")
        own = {"ETag": f'"{hash(data)}"', **headers}
        if not (wanted := request.headers.get("Range")):
            return Answer(200, own, data)
        start, stop = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        if start >= len(data):
            return Answer(416, {**own, "Content-Range": f"bytes */{len(data)}"}, b"")
        body = data[start : stop + 1]
        return Answer(206, {**own, "Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(data)}"}, body)

    return answer


def forwarded(port: int) -> Origin:
    """What another server on this machine answers."""

    def answer(request: Request, body: bytes) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "connection"}
        connection.request(request.method, request.path, body or None, headers)
        found = connection.getresponse()
        data = found.read()
        connection.close()
        dropped = {"connection", "transfer-encoding", "content-length", "server", "date"}
        kept = {name: value for name, value in found.getheaders() if name.lower() not in dropped}
        if request.method == "HEAD":
            kept["Content-Length"] = found.getheader("Content-Length", "0")
        return Answer(found.status, kept, data)

    return answer


class Server(socketserver.ThreadingTCPServer):
    """Gives what ``origin`` answers, unless ``plan`` has a fault for the request; counts both."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, origin: Origin, plan: Plan = lambda _: None, *, latency: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.origin, self.plan, self.latency = origin, plan, latency
        self.lock, self.requests, self.faults, self.bytes_sent = threading.Lock(), list[Request](), Counter[str](), 0

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    disable_nagle_algorithm = True

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            request = Request(len(self.server.requests), self.command, self.path, dict(self.headers.items()))
            self.server.requests.append(request)
            fault = self.server.plan(request)
            if fault:
                self.server.faults[fault if isinstance(fault, str) else str(fault.status)] += 1
        time.sleep(self.server.latency)
        answer = {
            "slow-down": s3_error(503, "SlowDown"),
            "too-many": Answer(429, {"Retry-After": "0"}, b""),
            "error": s3_error(500, "InternalError"),
        }.get(str(fault))
        if isinstance(fault, Answer):
            answer = fault
        if fault == "reset":
            self._hang_up()
            return
        answer = answer or self.server.origin(request, body)
        self.send_response(answer.status)
        headers, sent = {"Content-Length": str(len(answer.body)), **answer.headers}, answer.body
        if "Transfer-Encoding" in headers:
            del headers["Content-Length"]
        if fault == "short":  # a well-formed answer, and less than was asked for
            sent = answer.body[: len(answer.body) // 2]
            headers["Content-Length"] = str(len(sent))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault in ("drop", "stall"):
            sent = answer.body[: len(answer.body) // 2]
        with self.server.lock:  # before: whoever has got them may set the count to 0
            self.server.bytes_sent += len(sent)
        self.wfile.write(sent)
        self.wfile.flush()
        if fault == "stall":
            time.sleep(2)
        if fault in ("drop", "stall"):
            self._hang_up()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def serving(origin: Origin, plan: Plan = lambda _: None, *, latency: float = 0.0) -> Iterator[Server]:
    with Server(origin, plan, latency=latency) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def wait_for(port: int, seconds: float = 60) -> None:
    """Until something listens there."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def allow_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sockets connect to 127.0.0.1, and nowhere else."""

    def connect(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_INET and address[0] != "127.0.0.1":
            raise OSError(f"the tests run without a network, and {address} was to be contacted")
        _socket.socket.connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


class Bucket:
    """A bucket of moto's server, ``server`` before it."""

    def __init__(self, name: str, server: Server, backend: int) -> None:
        self.name, self.server, self._backend = name, server, backend

    def put(self, key: str, data: bytes) -> str:
        """Past the faults. Returns its address."""
        self._request("PUT", f"/{self.name}/{key}", data)
        return f"s3://{self.name}/{key}"

    def delete(self, key: str) -> None:
        self._request("DELETE", f"/{self.name}/{key}")

    def create(self) -> None:
        self._request("PUT", f"/{self.name}")

    def _request(self, method: str, path: str, data: bytes = b"") -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._backend, timeout=30)
        who = "AWS4-HMAC-SHA256 Credential=dummy/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
        connection.request(method, path, data, {"Authorization": who})
        answer = connection.getresponse()
        assert answer.status < 300, (answer.status, answer.getheaders())
        connection.close()


@contextmanager
def s3_server(patch: pytest.MonkeyPatch) -> Iterator[int]:
    """moto's server; its port. ``patch`` keeps the environment that starting it changes."""
    from moto.server import ThreadedMotoServer

    for name, value in KEYS.items():
        patch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield int(server.get_host_and_port()[1])
    finally:
        server.stop()


def environment(server: Server) -> dict[str, str]:
    """What makes a client of S3 take ``server``, and nothing else on this machine."""
    return {**os.environ, **KEYS, "AWS_ENDPOINT_URL": server.url, "AWS_CONFIG_FILE": os.devnull}
