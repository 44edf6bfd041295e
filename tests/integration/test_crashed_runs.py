"""A run that is marked as ended gives its deployment's slot back in the same step, whatever it was at."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from unittest.mock import MagicMock

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, State
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.states import Cancelling, Pending, Running

from flows import automations
from flows.deploy import POOLS


@flow
def nothing() -> None:
    pass


@pytest.fixture
def client(prefect_server: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


NEVER_STARTED = automations.crash_never_started("process")
SILENT = automations.crash_without_heartbeat(timedelta(seconds=90))
CANCELLING = automations.end_cancelling(timedelta(seconds=90))


@pytest.mark.parametrize(
    ("states", "automation"),
    [
        ([Pending], NEVER_STARTED),
        ([Pending, Running], SILENT),
        ([Pending, Running, Cancelling], CANCELLING),
    ],
    ids=["pending", "running", "cancelling"],
)
def test_what_an_automation_makes_of_a_run_frees_its_slot(
    client: SyncPrefectClient, states: list[Callable[[], State]], automation: AutomationCore
) -> None:
    (action,) = automation.actions
    assert isinstance(action, ChangeFlowRunState)
    limit = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    deployment = nothing.to_deployment(f"limited-{len(states)}", concurrency_limit=limit).apply()

    def taken() -> int:
        found = client.read_deployment(deployment).global_concurrency_limit
        assert found is not None
        return found.active_slots

    run = client.create_flow_run_from_deployment(deployment)
    for state in states:
        client.set_flow_run_state(run.id, state())
        assert taken() == 1
    client.set_flow_run_state(run.id, State(type=action.state))  # as the server does
    after = client.read_flow_run(run.id).state
    assert after is not None
    assert after.type == action.state
    assert taken() == 0


def test_every_state_before_the_end_has_an_automation_that_ends_it_when_the_run_is_silent() -> None:
    waits = {
        event: automation.trigger.within
        for automation in (NEVER_STARTED, SILENT, CANCELLING)
        if isinstance(automation.trigger, EventTrigger)
        for event in automation.trigger.after
    }
    assert waits == {
        "prefect.flow-run.Pending": timedelta(minutes=3),
        "prefect.flow-run.Running": timedelta(seconds=90),
        "prefect.flow-run.heartbeat": timedelta(seconds=90),
        "prefect.flow-run.Cancelling": timedelta(seconds=90),
    }
    assert set(automations.STARTS_WITHIN) == set(POOLS)


def test_a_pool_s_set_up_leaves_the_automations_of_other_pools() -> None:
    client = MagicMock()
    client.read_automations_by_name.return_value = []
    old = [MagicMock(), MagicMock(), MagicMock()]
    names = ("darkroom: never started", "darkroom: never started in pool docker", "somebody's own")
    for automation, name in zip(old, names, strict=True):
        automation.name = name
    client.read_automations.return_value = old
    lines = automations.set_automations(client, "process", timedelta(seconds=30), None)
    assert lines == [
        "automation darkroom: no heartbeat: created",
        "automation darkroom: no end of a cancellation: created",
        "automation darkroom: never started in pool process: created",
        "automation darkroom: never started: deleted",
    ]
