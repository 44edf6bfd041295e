"""A password in the tracking URI works and is never shown."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from darkroom.registry.tracking import RegistryUnavailable, _probe, unavailable_is_one_line


@pytest.fixture
def server() -> Iterator[int]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_address[1]
        listening.shutdown()


def test_a_server_behind_a_password_is_found(server: int) -> None:
    _probe(f"http://user:s3cret@127.0.0.1:{server}")


@pytest.mark.parametrize("uri", ["http://user:s3cret@127.0.0.1:9", "http://user:s3cret@no-such-host.invalid"])
def test_a_dead_server_is_named_without_its_password(uri: str) -> None:
    with pytest.raises(RegistryUnavailable) as caught:
        _probe(uri)
    assert "s3cret" not in str(caught.value)
    assert "user:***@" in str(caught.value)


def test_what_mlflow_says_is_passed_on_without_the_password() -> None:
    uri = "http://user:s3cret@127.0.0.1:9"
    with pytest.raises(RegistryUnavailable) as caught, unavailable_is_one_line(uri):
        raise OSError(f"API request to {uri}/api failed")
    assert "s3cret" not in str(caught.value)
