"""Prefect flows around the DVC pipeline: when and where it runs. Importing this package settles Prefect's environment.

Nothing has to be set up: without PREFECT_API_URL a run starts its own server and keeps its database in the project's
local state. All values are defaults, so whoever sets one of the variables is respected.
"""

import logging
import os
from pathlib import Path

from darkroom.errors import InputError
from darkroom.workspace import Workspace


def _state() -> Path:
    try:
        return Workspace.find().state
    except InputError:
        return Workspace.find(Path(__file__).parent).state


_DEFAULTS = {
    "PREFECT_HOME": str(_state() / "prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the default of 20 s is too short for a busy machine
    "PREFECT_CLI_PROMPT": "false",
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)


def _without_empty_traceback(record: logging.LogRecord) -> bool:
    """Prefect logs a failed state that a task returned with a traceback, of which there is none."""
    if record.exc_info == (None, None, None):
        record.exc_info = None
    return True


logging.getLogger("prefect.task_runs").addFilter(_without_empty_traceback)
