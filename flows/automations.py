"""What Prefect's server does by itself: it marks runs that died as Crashed, which frees their slots, and tells of them.

A run that is marked gives its deployment's slot back in the same step. So the bound for both is the time without a sign
of life here, and the server's five seconds between two looks.
"""

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

BEATS = 3  # without one of them a run is taken for dead
# How long a pool may take from taking a run to starting it: a process starts at once, an image may have to be pulled.
STARTS_WITHIN = {
    "process": timedelta(minutes=3),
    "docker": timedelta(minutes=30),
    "kubernetes": timedelta(minutes=30),
}
_PREFIX = "darkroom: "


def set_automations(client: "SyncPrefectClient", pool: str, heartbeat: timedelta, webhook: str | None) -> list[str]:
    """Mark runs that died as Crashed, and tell the webhook of them if there is one: the run itself no longer can."""
    within = BEATS * heartbeat
    wanted = [crash_without_heartbeat(within), end_cancelling(within), crash_never_started(pool)]
    if webhook:
        wanted.append(_tell_of_crashes(client, webhook))
    lines = [_set_automation(client, automation) for automation in wanted]
    kept = {automation.name for automation in wanted} | {_never_started_in(other) for other in STARTS_WITHIN}
    for stale in client.read_automations():
        if stale.name.startswith(_PREFIX) and stale.name not in kept:
            client.delete_automation(stale.id)
            lines.append(f"automation {stale.name}: deleted")
    return lines


def _set_automation(client: "SyncPrefectClient", wanted: "AutomationCore") -> str:
    found = client.read_automations_by_name(wanted.name)
    for double in found[1:]:
        client.delete_automation(double.id)
    if not found:
        client.create_automation(wanted)
        return f"automation {wanted.name}: created"
    if _content(found[0]) == _content(wanted):
        return f"automation {wanted.name}: as it was"
    client.update_automation(found[0].id, wanted)
    return f"automation {wanted.name}: updated"


def _content(automation: "AutomationCore") -> dict[str, Any]:
    content = automation.model_dump(mode="json", include={"name", "description", "enabled", "trigger", "actions"})
    return {**content, "trigger": _without_ids(content["trigger"])}


def _without_ids(value: Any) -> Any:
    """The same, without the identifiers that each trigger gets, and with sets in one order."""
    if isinstance(value, dict):
        return {name: _without_ids(inner) for name, inner in value.items() if name != "id"}
    return sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def crash_without_heartbeat(within: timedelta) -> "AutomationCore":
    """For a machine that is gone.

    States have names of their own here, so any event of the run counts as life.
    """
    return _end(
        f"{_PREFIX}no heartbeat",
        after={"prefect.flow-run.heartbeat", "prefect.flow-run.Running"},
        within=within,
        message=f"No sign of life for {within.total_seconds():.0f} s: its machine or its worker is gone.",
    )


def end_cancelling(within: timedelta) -> "AutomationCore":
    """For a run that was to be cancelled on a machine that is gone: the server lets it become nothing but Cancelled."""
    return _end(
        f"{_PREFIX}no end of a cancellation",
        after={"prefect.flow-run.Cancelling"},
        within=within,
        message=f"Cancelled, and no sign of life for {within.total_seconds():.0f} s.",
        state="CANCELLED",
    )


def crash_never_started(pool: str) -> "AutomationCore":
    """For a worker that died between taking a run and starting it. Other pools have their own."""
    within = STARTS_WITHIN[pool]
    return _end(
        _never_started_in(pool),
        after={"prefect.flow-run.Pending"},
        within=within,
        message=f"Taken by a worker but not started within {within.total_seconds() / 60:.0f} minutes.",
        related={"prefect.resource.role": "work-pool", "prefect.resource.name": pool},
    )


def _never_started_in(pool: str) -> str:
    return f"{_PREFIX}never started in pool {pool}"


def _end(
    name: str,
    *,
    after: set[str],
    within: timedelta,
    message: str,
    state: str = "CRASHED",
    related: dict[str, str] | None = None,
) -> "AutomationCore":
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    return AutomationCore(
        name=name,
        description=message,
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification(related or {}),
            for_each={"prefect.resource.id"},
            after=after,
            expect={"prefect.flow-run.*"},
            posture=Posture.Proactive,
            threshold=1,
            within=within,
        ),
        actions=[ChangeFlowRunState(state=StateType(state), message=message)],
    )


def _tell_of_crashes(client: "SyncPrefectClient", webhook: str) -> "AutomationCore":
    from prefect.blocks.webhook import Webhook
    from prefect.events.actions import CallWebhook
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    block = Webhook(method="POST", url=webhook, headers={"Content-Type": "application/json"})
    identifier = block.save("darkroom-webhook", overwrite=True)
    run = {"name": "{{ flow_run.name }}", "id": "{{ flow_run.id }}", "url": "{{ flow_run|ui_url }}"}
    text = "Darkroom: {{ flow_run.name }} crashed\n{{ flow_run|ui_url }}"
    payload = json.dumps({"event": "crashed", "text": text, "run": run})
    return AutomationCore(
        name=_PREFIX + "tell of crashes",
        description="Calls DARKROOM_WEBHOOK for a run that was marked Crashed.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            expect={"prefect.flow-run.Crashed"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[CallWebhook(block_document_id=identifier, payload=payload)],
    )
