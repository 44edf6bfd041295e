"""Who is told of what happens to runs: an HTTP server that keeps it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Webhooks:
    """Everything that was sent to `url`."""

    url: str = ""
    received: list[Any] = field(default_factory=list)


@contextmanager
def receiver() -> Iterator[Webhooks]:
    """An HTTP server that keeps the body of each POST, parsed if it is JSON."""
    webhooks = Webhooks()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                webhooks.received.append(json.loads(body))
            except ValueError:
                webhooks.received.append(body.decode(errors="replace"))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    webhooks.url = f"http://127.0.0.1:{listener.server_address[1]}/hook"
    try:
        yield webhooks
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
