"""What a page of somebody else's tries with the stack: twelve calls, made by a real browser that was led to it.

The page's server is the browser's proxy as well, so that a name of its own can lead to a server of this machine: what a
page gets by DNS rebinding.
"""

import http.client
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from urllib.parse import urlsplit

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
REBOUND = "10.rebound.test"  # as if it were an address of a private network
_PAGE, _FRAME = (Path(__file__).with_name(f"{name}.html").read_text() for name in ("page", "frame"))
_QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def try_calls(given: dict[str, object], origin: str) -> dict[str, bool]:
    """Lead a browser to a page on the host `origin`; for each call whether the page could read the answer to it."""
    with _page(given) as (port, tried), tempfile.TemporaryDirectory() as profile:
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}"]
        command += ["--host-resolver-rules=MAP page.test 127.0.0.1", "--proxy-bypass-list=page.test"]
        command += [f"--proxy-server=127.0.0.1:{port}", "--remote-debugging-port=0", f"http://{origin}:{port}/"]
        browser = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            return tried.get(timeout=90)
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()


@contextmanager
def _page(given: dict[str, object]) -> Iterator[tuple[int, Queue[dict[str, bool]]]]:
    """The port of the page's server, and what the page says when it has tried everything."""
    tried: Queue[dict[str, bool]] = Queue()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, content: bytes, kind: str = "text/html") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/frame":
                self.answer(200, _FRAME.encode())
            elif url.path == "/tried":
                tried.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.answer(200, b"")
            elif url.hostname == REBOUND:
                self.forward(url.port or 80, self.path.split(url.netloc, 1)[1])
            elif url.path == "/":
                self.answer(200, _PAGE.replace("GIVEN", json.dumps(given)).encode())
            else:
                self.answer(404, b"")

        def do_POST(self) -> None:
            self.do_GET()

        def forward(self, port: int, path: str) -> None:
            """Pass a request on to this machine as it is: with the name that the browser asked for."""
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("proxy-connection", "connection", "accept-encoding"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            self.answer(answer.status, answer.read(), answer.headers.get("Content-Type", "text/plain"))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1]), tried
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
