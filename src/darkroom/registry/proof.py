"""The proof that a registered version works: loaded from the registry in a clean process, drawn from, timed."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.errors import InputError, StageFailed
from darkroom.registry.tracking import import_mlflow, tracking_uri
from darkroom.registry.versions import WEIGHTS_TAG, score_tag
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_START_SECONDS = 300  # to fetch and load a model
_DRAWS = 6  # at most: one to warm up, three timed, two to compare


@dataclass(frozen=True)
class Proof:
    """What a version that works was seen to do."""

    seconds_per_image: float  # one image alone, with the parameters that it draws with by default


def prove(workspace: Workspace, version: "ModelVersion", max_seconds_per_image: float) -> Proof:
    """Load the version in a clean process and draw. Draws that take far longer than they may end the attempt.

    Raises StageFailed unless it loads the weights that its tags name, with its own code and nothing of this process,
    and draws images that are finite and differ. Raises InputError for a version that darkroom did not register.
    """
    uri = f"models:/{version.name}/{version.version}"
    weights = version.tags.get(WEIGHTS_TAG)
    if weights is None:
        raise InputError(f"{uri} has no tag {WEIGHTS_TAG}: `darkroom register` did not make it, so it cannot be proven")
    found = _run(workspace, uri, _START_SECONDS + _DRAWS * max_seconds_per_image)
    if objections := _objections(version, weights, found):
        raise StageFailed(f"{uri} {objections[0]}; the aliases are as before")
    return Proof(float(found["seconds_per_image"]))


def _run(workspace: Workspace, uri: str, limit_seconds: float) -> dict[str, Any]:
    """What `smoke.py` found."""
    import_mlflow()  # sets what makes it quiet, for the process below too
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"MLFLOW_TRACKING_URI": tracking_uri(workspace)}
    command = [sys.executable, "-I", "-B", str(Path(__file__).with_name("smoke.py")), uri]
    with tempfile.TemporaryDirectory(prefix="darkroom-") as directory:
        try:
            done = subprocess.run(
                command, cwd=directory, env=environment, capture_output=True, text=True, timeout=limit_seconds
            )
        except subprocess.TimeoutExpired:
            raise StageFailed(
                f"{uri} did not load and draw within {limit_seconds:.0f} s; the aliases are as before"
            ) from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise StageFailed(f"{uri} does not work when loaded ({last}); the aliases are as before")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _objections(version: "ModelVersion", weights: str, found: dict[str, Any]) -> list[str]:
    """What speaks against a model that was loaded and has drawn, as the rest of a sentence about it."""
    loaded, stated = found["weights_digest"], found["metadata"]["weights_digest"]
    protocol = found["metadata"]["protocol_digest"]
    objections = []
    if loaded != weights:
        objections.append(f"loads other weights than its tag says ({loaded[:12]} instead of {weights[:12]})")
    if stated is not None and stated != weights:
        objections.append(f"states other weights than its tag says ({stated[:12]} instead of {weights[:12]})")
    if protocol is not None and score_tag(protocol) not in version.tags:
        objections.append(f"states that it was scored under protocol {protocol[:12]}, and its tags have no such score")
    if Path(found["code"]).is_relative_to(Path(__file__).parents[1]):
        objections.append("runs this project's code instead of its own")
    if found["distinct"] != 2:
        objections.append("draws the same image twice")
    return objections
