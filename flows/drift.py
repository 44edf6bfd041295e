"""How far the data has moved from the accepted data set, measured before anything is trained on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from darkroom.data.validation.drift import ACCEPTED_FILE
from darkroom.workspace import Workspace
from flows import raw_data
from flows.darkroom_command import answer
from flows.dvc_stage import run_stage
from flows.limits import gpu_slot
from flows.settings import Settings
from flows.workspaces import workspace


@dataclass(frozen=True)
class Drift:
    """Figures as `darkroom data drift` gives them; None where there is nothing to compare with, and `why` says so."""

    class_drift: float | None
    channel_drift: float | None
    why: str = ""

    def is_below(self, threshold: float) -> bool:
        """Whether both figures are known and below it."""
        return all(figure is not None and figure < threshold for figure in (self.class_drift, self.channel_drift))

    def __str__(self) -> str:
        if self.why:
            return self.why
        return f"class drift {self.class_drift:.4g}, channel drift {self.channel_drift:.4g}"


def measure_drift(name: str, ref: str, params: Mapping[str, Any], log: Callable[[str], None] = print) -> Drift:
    """Prepare the data as it is now in a workspace called `name` at `ref` and compare it with what was accepted there.

    What was prepared stays in DVC's cache, so a training with the same data does not prepare it again. Raises
    InputError for data that cannot be prepared, and what else `run_stage` raises.
    """
    with workspace(name, ref, params, log) as root:
        raw_data.sync(Settings.from_environment(), root, log)
        with gpu_slot():
            run_stage(root, "prepare", log=log)
        if not Workspace(root).expectations.with_name(ACCEPTED_FILE).is_file():
            return Drift(None, None, "no data set was accepted, so there is nothing to compare with")
        found = answer(root, "data", "drift", log=log, ok=(0, 1))
        return Drift(found["class_drift"], found["channel_drift"], "; ".join(found["reasons"]))
