"""Tells a webhook how a run ended: one JSON object, with a `text` that Slack and its like show as it is.

It is a courtesy: whatever becomes of it, the run ends as it would have, a few seconds later at the most.
"""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from darkroom.errors import InputError

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun, State

Event = Literal["promoted", "refused", "failed", "bad_input", "interrupted", "crashed", "cancelled"]

_TRIES = 3
_TIMEOUT = 4.0  # seconds that one try may take
_PAUSE = 1.0  # seconds before the next
_LIMIT = 15.0  # seconds that a run waits for all of it
_BY_STATE: dict[str, Event] = {
    "BadInput": "bad_input",
    "Interrupted": "interrupted",
    "Refused": "refused",
}
_BY_TYPE: dict[str, Event] = {"CRASHED": "crashed", "CANCELLING": "cancelled", "CANCELLED": "cancelled"}


def notice(
    event: Event,
    *,
    run: Mapping[str, str | None],
    reasons: Sequence[str] = (),
    model: str | None = None,
    version: str | None = None,
    previous: str | None = None,
    figures: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What is sent: `run` has the flow run's name, id and url, `figures` those of the version."""
    what = f" version {version} of {model}" if version and model else ""
    words = {
        "promoted": f"promoted{what}" + (f"; version {previous} served before" if previous else ""),
        "refused": f"refused{what}; " + (f"version {previous} stays" if previous else "nothing serves"),
        "bad_input": "cannot start: bad input",
    }.get(event, event)
    lines = [f"Darkroom: {run.get('name')} {words}", *(f"- {reason}" for reason in reasons)]
    if figures and "unguided.fid" in figures:
        lines.append(f"FID {figures['unguided.fid']:.3f}")
    if run.get("url"):
        lines.append(str(run["url"]))
    return {
        "event": event,
        "text": "\n".join(lines),
        "run": dict(run),
        "model": model,
        "version": version,
        "previous": previous,
        "reasons": list(reasons),
        "figures": dict(figures or {}),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_url(url: str) -> None:
    """Raise InputError unless `url` can be posted to."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or any(character.isspace() for character in url):
        raise InputError("DARKROOM_WEBHOOK: expected a URL, https://…; it is not shown because it may hold a secret")


def send(url: str | None, content: Mapping[str, Any], warn: Callable[[str], None]) -> bool:
    """Post `content`, trying a few times; whether it arrived. Without a URL there is nothing to do. Never raises."""
    try:
        if not url:
            return False
        check_url(url)
    except InputError:
        return False  # the run has been refused for it
    problems: list[str] = []
    poster = threading.Thread(target=_post, args=(url, json.dumps(content).encode(), problems), daemon=True)
    poster.start()
    poster.join(_LIMIT)
    if poster.is_alive():
        problems = [f"no answer within {_LIMIT:.0f} s"]
    if problems:
        warn(f"The webhook at {_host(url)} was not told of {content.get('event')}: {problems[-1]}")
    return not problems


def _post(url: str, body: bytes, problems: list[str]) -> None:
    """One notice, with its problem left in `problems` if it did not arrive."""
    for left in reversed(range(_TRIES)):
        problems.clear()
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json", "User-Agent": "darkroom"})
            urllib.request.urlopen(request, timeout=_TIMEOUT).close()
            return
        except urllib.error.HTTPError as error:
            problems.append(f"it answered {error.code}")
            if error.code < 500 and error.code != 429:
                return
        except Exception as error:  # the text of some repeats the URL
            problems.append(type(getattr(error, "reason", error)).__name__)
        if left:
            time.sleep(_PAUSE)


def _host(url: str) -> str:
    """Of a URL whose path is often the secret, what may be logged."""
    return f"{urlsplit(url).scheme}://{urlsplit(url).hostname}/…"


def describe_run(flow_run: "FlowRun | None" = None) -> dict[str, str | None]:
    """Name, id and page of a flow run; of the current one by default."""
    from prefect.runtime import flow_run as current
    from prefect.utilities.urls import url_for

    if flow_run is None:
        identity, name = current.id, current.name
        url = url_for("flow-run", obj_id=identity) if identity else None
    else:
        identity, name, url = str(flow_run.id), flow_run.name, url_for(flow_run)
    return {"name": name, "id": identity, "url": url}


def ended_badly(flow: "Flow[..., Any]", flow_run: "FlowRun", state: "State[Any]") -> None:
    """A flow's hook for failed, crashed and cancelled runs. Of a refusal the run itself told, with its figures."""
    from prefect.logging import get_logger

    event = _BY_STATE.get(state.name or "") or _BY_TYPE.get(state.type.value, "failed")
    if event != "refused":
        reasons = (state.message or "").splitlines()
        content = notice(event, run=describe_run(flow_run), reasons=reasons)
        send(os.environ.get("DARKROOM_WEBHOOK"), content, get_logger("darkroom.notify").warning)
