"""Git with nobody there: what it says of a repository holds no secrets."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from darkroom.errors import StageFailed
from flows.git import clone


@pytest.fixture
def refusing() -> Iterator[str]:
    """A web server that wants a password for everything: its host and port."""

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("user", ["t0ken", "me:t0ken", "t0ken:x-oauth-basic"])
def test_a_token_in_the_address_is_not_shown(refusing: str, user: str, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=f"git ls-remote: fatal: .*{refusing}") as caught:
        clone(f"http://{user}@{refusing}/it.git", "main", tmp_path / "clone")
    assert "t0ken" not in str(caught.value)
