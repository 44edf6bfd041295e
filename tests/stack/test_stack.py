"""The stack itself: it comes up, is set up once, restarts what dies, and stops without a trace."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.stack.running import Stack, start_stack

pytestmark = pytest.mark.timeout(300)


def command(stack: Stack, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = stack.environment | stack.client_environment
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=stack.root, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_second_set_up_changes_nothing(stack: Stack) -> None:
    def known() -> dict[str, tuple[str, str]]:
        with stack.prefect() as client:
            answer = client.request("POST", "/automations/filter", json={}).json()
        return {found["name"]: (found["id"], found["updated"]) for found in answer}

    before = known()
    again = command(stack, "flows.deploy")
    assert again.returncode == 0, again.stderr
    assert again.stdout
    assert [line for line in again.stdout.splitlines() if "as it was" not in line] == []
    assert known() == before
    assert len(before) == 4


@pytest.mark.soak
def test_a_second_stack_in_the_same_checkout_is_refused_in_one_line(stack: Stack) -> None:
    second = command(stack, "flows.stack")
    assert second.returncode == 1
    assert second.stderr.splitlines() == [
        f"The stack of this checkout runs already, in {stack.directory}: python -m flows.stack status"
    ]
    assert command(stack, "flows.stack", "status").returncode == 0


@pytest.mark.soak
def test_what_dies_is_started_again(stack: Stack) -> None:
    for service in ("mlflow", "worker"):
        before = stack.pid(service)
        stack.kill(service)
        stack.until(lambda s=service, b=before: stack.pid(s) != b and stack.is_well(), 90, f"{service} to be back")
    assert stack.mlflow().search_experiments()


@pytest.mark.soak
def test_a_stop_leaves_no_process_and_the_next_start_finds_its_data(tmp_path: Path) -> None:
    with start_stack(tmp_path / "project") as stack:
        stack.s3().put_object(Bucket=stack.bucket, Key="cats/a b/1.png", Body=b"an image")
        experiment = stack.mlflow().create_experiment("kept")
        assert stack.stop() == 0
        assert stack.processes() == []

        stack.start()
        assert stack.s3().get_object(Bucket=stack.bucket, Key="cats/a b/1.png")["Body"].read() == b"an image"
        assert stack.mlflow().get_experiment(experiment).name == "kept"
        with stack.prefect() as client:
            assert client.read_work_pools()

        assert stack.process is not None
        stack.process.kill()
        stack.process.wait()
        _, alive = psutil.wait_procs(stack.processes(), timeout=60)
        assert alive == []
