"""Errors that say all in one line, as states: their message is the last thing to read, not a traceback."""

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Failed

from darkroom.errors import InputError, Interrupted, StageFailed


class NotReady(StageFailed):
    """What a run needs around it is not there: room on the disk, a limit, a bucket. A line for each."""


EXPECTED = (InputError, Interrupted, StageFailed)


def failed(error: Exception) -> State[Any]:
    """Failed, as BadInput, NotReady, Interrupted or Unavailable where it is one of these; keeps the error."""
    from darkroom.registry.tracking import RegistryRefused, RegistryUnavailable

    if isinstance(error, InputError):
        return Failed(name="BadInput", message=str(error), data=error)
    if isinstance(error, NotReady):
        return Failed(name="NotReady", message=str(error), data=error)
    if isinstance(error, Interrupted):
        return Failed(name="Interrupted", message=str(error), data=error)
    if isinstance(error, RegistryUnavailable) and not isinstance(error, RegistryRefused):
        return Failed(name="Unavailable", message=f"{error}; nothing is lost, the same run carries on", data=error)
    return Failed(message=str(error), data=error)


def if_unavailable(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """A `retry_condition_fn`: a server that does not answer may do so later; nothing else gets better by itself."""
    return state.name == "Unavailable"


def if_interrupted(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """A `retry_condition_fn`: what was stopped from outside with its state saved carries on."""
    return state.name == "Interrupted"
