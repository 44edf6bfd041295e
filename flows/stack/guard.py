"""Whom a server of the stack answers: programs, and its own pages; no page of anybody else's.

A browser says in Host where it was led and in Origin and Sec-Fetch-Site who asks; a page cannot change them. A name
that is not this machine's means DNS rebinding: the page's own name, made to lead here.
"""

import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Callable[[], Awaitable[Message]], Send], Awaitable[None]]


def refusal(method: str, headers: Mapping[str, str]) -> str | None:
    """Why a request is refused, or None. The names of `headers` are in lower case.

    DARKROOM_STACK_HOSTS has more names of this machine, separated by commas: that of a proxy, of a container.
    """
    try:
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        origin = headers.get("origin")
        from_here = origin is None or (urlsplit(origin).netloc == host and "://" in origin)
    except ValueError:
        return "malformed Host or Origin"
    # Names below .localhost are never anybody else's: buckets as subdomains.
    if not name or (name not in _names() and not name.endswith(".localhost")):
        return "not a name of this server"
    if not from_here:
        return "a page of another origin"
    followed = (method, headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("GET", "navigate", "document")
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not followed:
        return "a page of another site"
    return None


def _names() -> set[str]:
    return {"127.0.0.1", "localhost", "::1", *os.environ.get("DARKROOM_STACK_HOSTS", "").split(",")}


class Guard:
    """An ASGI application that refuses what `refusal` does with 403, and passes everything else on to another."""

    def __init__(self, application: Application) -> None:
        self._application = application

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        reason = None
        if scope["type"] in ("http", "websocket"):
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            reason = refusal(scope.get("method", "GET"), headers)
        if reason is None:
            await self._application(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        else:
            text = f"Refused: {reason}\n".encode()
            length = (b"content-length", str(len(text)).encode())
            await send(
                {"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain"), length]}
            )
            await send({"type": "http.response.body", "body": text})
