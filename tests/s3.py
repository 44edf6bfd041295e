"""An S3 over real HTTP for tests, and a proxy in front of it that misbehaves on demand."""

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import boto3
import pytest
from moto.server import ThreadedMotoServer
from mypy_boto3_s3 import S3Client


@contextmanager
def server() -> Iterator[str]:
    """An S3 at the URL that is given."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        moto.stop()


@contextmanager
def empty_bucket(endpoint: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Client]:
    """A client of an S3 with an empty bucket, reached through the environment alone; the bucket goes at the end."""
    for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    client = boto3.client("s3")
    client.create_bucket(Bucket=name)
    yield client
    for page in client.get_paginator("list_object_versions").paginate(Bucket=name):
        for entry in [*page.get("Versions", []), *page.get("DeleteMarkers", [])]:
            client.delete_object(Bucket=name, Key=entry["Key"], VersionId=entry["VersionId"])
    client.delete_bucket(Bucket=name)


def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask again at once instead of after a while."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    monkeypatch.setattr("darkroom.data.s3.client._LONGEST_PAUSE", 0.01)
    monkeypatch.setattr("darkroom.data.s3.download._LONGEST_PAUSE", 0.01)


@dataclass(frozen=True)
class Request:
    """What a client asked the proxy for."""

    method: str
    path: str  # with the query
    range: str | None


@dataclass(frozen=True)
class Fault:
    """What the proxy does instead of passing the server's answer on."""

    status: int = 0  # answer with this, and `code` as S3 words it
    code: str = ""
    body: bytes | None = None  # of that answer
    keep: int | None = None  # bytes of the body after which the connection ends
    reset: bool = False  # the connection ends with a reset, before the answer or after `keep` bytes
    flip: int | None = None  # this byte of the body is inverted
    clip: bool = False  # the Content-Length is `keep` as well: the loss does not show in HTTP


@dataclass
class Proxy:
    """`url` leads to the server through `fault`, which sees each request first and may name a fault, wait, or act."""

    url: str = ""
    fault: Callable[[Request], Fault | None] = lambda _: None
    requests: list[Request] = field(default_factory=list)

    def gets(self, name: str) -> list[Request]:
        """Requests for the content of the object whose key ends with `name`."""
        return [r for r in self.requests if r.method == "GET" and urlsplit(r.path).path.endswith(name)]


def first(count: int, fault: Fault, method: str = "GET", name: str = "") -> Callable[[Request], Fault | None]:
    """The fault for the first `count` requests of this method whose path ends with `name`."""
    left, lock = count, threading.Lock()

    def decide(request: Request) -> Fault | None:
        nonlocal left
        if request.method != method or not urlsplit(request.path).path.endswith(name):
            return None
        with lock:
            left -= 1
            return fault if left >= 0 else None

    return decide


def first_of_each(count: int, fault: Fault, name: str) -> Callable[[Request], Fault | None]:
    """The fault for the first request for each of `count` objects whose key ends with `name`: none gets it twice."""
    seen: set[str] = set()
    lock = threading.Lock()

    def decide(request: Request) -> Fault | None:
        path = urlsplit(request.path).path
        if request.method != "GET" or not path.endswith(name):
            return None
        with lock:
            if path in seen or len(seen) == count:
                return None
            seen.add(path)
            return fault

    return decide


@contextmanager
def faulty(target: str) -> Iterator[Proxy]:
    """A proxy in front of the server at `target`."""
    proxy = Proxy()
    host = urlsplit(target).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_any(self) -> None:
            request = Request(self.command, self.path, self.headers.get("Range"))
            proxy.requests.append(request)
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = proxy.fault(request) or Fault()
            if fault.reset and fault.keep is None:
                self.drop()
                return
            if fault.status:
                text = f"<Error><Code>{fault.code}</Code><Message>as the test wants</Message></Error>".encode()
                self.answer(fault.status, {"Content-Type": "application/xml"}, fault.body or text, Fault())
                return
            upstream = http.client.HTTPConnection(host, timeout=30)
            upstream.request(self.command, self.path, body=sent, headers=dict(self.headers.items()))
            reply = upstream.getresponse()
            self.answer(reply.status, dict(reply.getheaders()), reply.read(), fault)
            upstream.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815 (http.server's names)

        def answer(self, status: int, headers: dict[str, str], body: bytes, fault: Fault) -> None:
            headers = {n: v for n, v in headers.items() if n.lower() not in ("connection", "transfer-encoding")}
            if self.command != "HEAD":
                headers = {n: v for n, v in headers.items() if n.lower() != "content-length"}
                headers["Content-Length"] = str(fault.keep if fault.clip else len(body))
            if fault.flip is not None:
                body = body[: fault.flip] + bytes([body[fault.flip] ^ 255]) + body[fault.flip + 1 :]
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: fault.keep])
            if fault.keep is not None:
                self.wfile.flush()
                self.drop() if fault.reset else self.end()

        def drop(self) -> None:
            # Closing without lingering sends a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.end()

        def end(self) -> None:
            self.close_connection = True

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 64

        def shutdown_request(self, request: object) -> None:
            self.close_request(request)  # type: ignore[arg-type]  # without the farewell that would soften a reset

        def handle_error(self, *_: object) -> None:
            pass  # a client that was killed

    listener = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    proxy.url = f"http://127.0.0.1:{listener.server_address[1]}"
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
