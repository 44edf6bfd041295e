"""From objects that are put on S3 to another model that serves, with nobody between."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image
from prefect.client.schemas.objects import FlowRun, State

from tests.stack.running import Stack

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

PREFIX = "delivered"
DRAW = """
import json, sys
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model("models:/digits@champion")
drawn = model.predict(pd.DataFrame({"class_label": [0]}))
print(json.dumps([model.metadata.metadata["weights_digest"], len(drawn)]))
"""


def digits(first: int, count: int) -> dict[str, bytes]:
    """PNGs of scikit-learn's digits by name, in a folder for each class."""
    from sklearn.datasets import load_digits

    data = load_digits()
    found = {}
    for number in range(first, first + count):
        content = io.BytesIO()
        Image.fromarray((data.images[number] * 15).astype("uint8")).save(content, "PNG")
        found[f"{data.target[number]}/{number:04}.png"] = content.getvalue()
    return found


def put(stack: Stack, files: dict[str, bytes]) -> None:
    client = stack.s3()
    with ThreadPoolExecutor(8) as pool:
        for done in [
            pool.submit(client.put_object, Bucket=stack.bucket, Key=f"{PREFIX}/{name}", Body=content)
            for name, content in files.items()
        ]:
            done.result()


def look(stack: Stack) -> State[Any]:
    """What a watch says, as its schedule would start it."""
    source = f"s3://{stack.bucket}/{PREFIX}"
    params = {"data.source": source, "validate.min_images_per_class": 20}
    run = stack.run("watch/watch", source=source, settle_seconds=3, parameters={"ref": "HEAD", "params": params})
    return stack.wait(run, timeout=120)


def looks_until(stack: Stack, name: str) -> State[Any]:
    """Look again and again, like a schedule of seconds."""
    deadline = time.monotonic() + 120
    while (state := look(stack)).name != name:
        assert time.monotonic() < deadline, f"{state!r}: waited for {name}"
        assert state.name == "Settling", repr(state)
    return state


def served(stack: Stack) -> str:
    """The digest of the weights that an application gets that loads `@champion` now, and draws with."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", DRAW],
        env={**stack.environment, "MLFLOW_TRACKING_URI": stack.mlflow_url},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    digest, images = json.loads(done.stdout.splitlines()[-1])
    assert images == 1
    return str(digest)


def started(stack: Stack, known: list[FlowRun]) -> list[FlowRun]:
    before = {run.id for run in known}
    return [run for run in stack.runs("retrain/retrain") if run.id not in before]


def test_new_objects_cause_one_retraining_whose_model_serves_and_the_same_again_none(
    stack: Stack, report: Callable[[str, list[str]], None]
) -> None:
    known = stack.runs("retrain/retrain")
    began = time.monotonic()
    put(stack, digits(0, 400))
    looks_until(stack, "Started")
    stack.until(lambda: bool(started(stack, known)), 60, "the retraining to begin")
    (first,) = started(stack, known)
    assert look(stack).name == "Running"
    assert stack.wait(first, timeout=300).name == "Promoted", "\n".join(stack.logs(first))
    assert look(stack).name == "Unchanged"
    before = served(stack)
    lines = [f"{time.monotonic() - began:6.1f} s  from the first objects to a model that serves"]

    began = time.monotonic()
    put(stack, digits(400, 100))
    looks_until(stack, "Started")
    stack.until(lambda: bool(started(stack, [*known, first])), 60, "the retraining to begin")
    (second,) = started(stack, [*known, first])
    assert stack.wait(second, timeout=300).name == "Promoted", "\n".join(stack.logs(second))
    assert stack.task_states(second)["prepare"] == "Ran"
    assert served(stack) != before
    lines.append(f"{time.monotonic() - began:6.1f} s  from more objects to another model that serves")
    report("new data", lines)

    put(stack, digits(400, 100))  # the same bytes
    assert look(stack).name == "Unchanged"
    time.sleep(4)  # had they been new, they would have settled
    assert look(stack).name == "Unchanged"
    assert started(stack, [*known, first, second]) == []
    with stack.prefect() as client:
        events = client._client.post(
            "/events/filter", json={"filter": {"event": {"name": ["darkroom.data.changed"]}}, "limit": 50}
        ).json()["events"]
    assert len([event for event in events if PREFIX in event["resource"]["prefect.resource.id"]]) == 2
