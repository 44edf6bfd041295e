"""What every test needs: an environment that is quiet, offline and its own, and one Prefect server for the session."""

import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import forks
from tests.oracles import TABLE, OracleTable

# Before anything imports torch, Prefect, MLflow or DVC. Nothing here may come from the project's own state.
_SCRATCH = tempfile.TemporaryDirectory(prefix="darkroom-tests-")
_GPU = os.environ.get("DARKROOM_TEST_DEVICE", "cuda")  # where tests with the marker gpu run; a rehearsal's is cpu
# What the processes of one run share, and the process that outlives the others.
os.environ.setdefault("TESTS_SHARED", _SCRATCH.name)
os.environ.setdefault("TESTS_OWNER", str(os.getpid()))
for _name in list(os.environ):
    if _name.startswith(("AWS_", "DARKROOM_", "DVC_", "MLFLOW_", "PREFECT_")):
        del os.environ[_name]
os.environ.update(
    {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SECRET_ACCESS_KEY": "test",
        "DO_NOT_TRACK": "true",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": f"{_SCRATCH.name}/dvc-site",
        "GIT_AUTHOR_EMAIL": "test@example.org",
        "GIT_AUTHOR_NAME": "test",
        "GIT_COMMITTER_EMAIL": "test@example.org",
        "GIT_COMMITTER_NAME": "test",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MPLBACKEND": "Agg",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": f"{_SCRATCH.name}/prefect",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PYTHONUNBUFFERED": "1",
        "SHELL": "/bin/sh",
    }
)
# A shell starts background jobs with SIGINT ignored, and children inherit that; the tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
Path(os.environ["PREFECT_HOME"]).mkdir()
_REPORTS = pytest.StashKey[dict[str, list[str]]]()


@pytest.hookimpl(optionalhook=True)  # a GPU machine has no xdist
def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: a third of the tests' time is spent waiting for processes, locks and servers."""
    from darkroom.data.workers import worker_count

    return worker_count() + 1


@pytest.fixture(scope="session", autouse=True)
def _path_of_imports() -> list[str]:
    return sys.path.copy()


@pytest.fixture(autouse=True)
def _a_test_leaves_the_process_as_it_was(_path_of_imports: list[str]) -> Iterator[None]:
    """What a command, or a model loaded in this process, would otherwise leave to the tests after it."""
    logger = logging.getLogger("darkroom")
    level = logger.level
    yield
    logger.setLevel(level)
    # MLflow puts a loaded model's own code first, and a process that is spawned later would import that.
    sys.path[:] = _path_of_imports
    # It also keeps an S3 client for an hour, whatever endpoint the environment names by then.
    if (s3 := sys.modules.get("mlflow.store.artifact.s3_artifact_repo")) is not None:
        s3._cached_get_s3_client.cache_clear()


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("hypothesis"):  # a GPU host may be without
        from hypothesis import settings

        settings.register_profile("darkroom", deadline=None)  # machines are shared: a time says nothing about the code
        settings.load_profile("darkroom")
    config.stash[TABLE] = OracleTable()
    config.stash[_REPORTS] = {}


# What takes longest begins first, so that no process is left alone with it at the end.
_FIRST = ("tests/stack", "tests/soak", "tests/pipeline", "tests/unit/test_gpu_benchmark.py", "tests/integration")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, place in enumerate(_FIRST) if item.nodeid.startswith(place)), 9))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file run in one process, and so do files that share a Prefect server or a stack."""
    from xdist.scheduler import LoadFileScheduling

    class ByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            if file.startswith("tests/stack/"):
                return "stack"
            return "prefect_server" if _needs_prefect(config.rootpath / file) else file

    return ByServer(config, log)


@cache
def _needs_prefect(file: Path) -> bool:
    return file.is_file() and "prefect_server" in file.read_text()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With several processes each sends what it has to the one that prints."""
    if (sent := getattr(session.config, "workeroutput", None)) is not None:
        sent["oracles"] = session.config.stash[TABLE].rows()
        sent["reports"] = session.config.stash[_REPORTS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    sent = getattr(node, "workeroutput", {})  # nothing from a process that was killed
    node.config.stash[TABLE].add(sent.get("oracles", []))
    node.config.stash[_REPORTS].update(sent.get("reports", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, lines in {"oracles": list(config.stash[TABLE].lines()), **config.stash[_REPORTS]}.items():
        if lines:
            terminalreporter.section(title)
            terminalreporter.write("\n".join(lines) + "\n")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The torch.device of a test with the marker gpu."""
    from darkroom.device import choose_device

    monkeypatch.setenv("DARKROOM_DEVICE", _GPU)
    return choose_device()


@pytest.fixture
def never_waiting(gpu: Any) -> Callable[[], AbstractContextManager[None]]:
    """`with never_waiting():` torch raises at whatever waits for the GPU. A CPU has nothing to wait for."""
    import torch

    @contextmanager
    def guard() -> Iterator[None]:
        if gpu.type != "cuda":
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return guard


@pytest.fixture
def report(pytestconfig: pytest.Config) -> Callable[[str, list[str]], None]:
    """`report(title, lines)`: what the run shows at its end, passed or failed."""
    return pytestconfig.stash[_REPORTS].__setitem__


@pytest.fixture
def oracle(pytestconfig: pytest.Config) -> OracleTable:
    """`oracle(ours, reference, measured, tolerance)` fails unless measured <= tolerance; the run ends with a table."""
    return pytestconfig.stash[TABLE]


@pytest.fixture(scope="module")
def warm() -> Iterator[None]:
    """DVC, stages and `darkroom` commands are forks of a process that has their imports: for tests of what they do."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in forks.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of their own, in a module that is `warm`: for tests of how they end."""
    monkeypatch.delenv("TESTS_WARM", raising=False)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server with a database of its own; it takes 10 to 20 s, so there is one."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def _empty_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("empty") / "project"
    root.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run([sys.executable, "-P", "-m", "dvc", "init", "-q"], cwd=root, check=True)
    return root


@pytest.fixture
def dvc_project(tmp_path: Path, _empty_project: Path) -> Callable[..., Path]:
    """Make a Git and DVC repository with stages: `dvc_project(name=(source of its script, dvc.yaml fields), …)`."""

    def make(**stages: tuple[str, dict[str, object]]) -> Path:
        import yaml

        root = tmp_path / "project"
        shutil.copytree(_empty_project, root)
        (root / "params.yaml").write_text("{}\n")
        definition = {}
        for name, (source, fields) in stages.items():
            (root / f"{name}.py").write_text(source)
            definition[name] = {"cmd": f"python {name}.py", **fields}
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": definition}, sort_keys=False))
        return root

    return make
