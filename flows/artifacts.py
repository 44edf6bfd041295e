"""What a person opens in Prefect: the table of stages, a stage's progress, its MLflow run, the sample grid."""

import base64
import contextlib
import contextvars
import io
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast
from urllib.parse import urlsplit
from uuid import UUID

import psutil
from prefect import get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from darkroom.errors import InputError, StageFailed
from darkroom.workspace import Workspace
from flows.stage_output import Progress

if TYPE_CHECKING:
    from flows.dvc_stage import Outcome

PICTURE_BYTES = 256 * 1024  # of a picture inside an artifact, which is a row of Prefect's database

_UPDATE_EVERY = 5.0  # seconds between two updates of a progress artifact
_LINK_EVERY = 20.0  # seconds between two attempts to find the MLflow run of a training
_END_SECONDS = 5.0  # that a stage which has ended waits for its artifacts


def stage_table(outcomes: "Sequence[Outcome]", failed: tuple[str, str] | None = None) -> None:
    """Show how each stage ended; `failed` names the one that did not complete, and the name of its state."""
    rows = [
        {
            "stage": o.stage,
            "outcome": o.name,
            "seconds": round(o.seconds, 1),
            "files": o.files,
            "size": human_size(o.size),
        }
        for o in outcomes
    ]
    if failed is not None:
        rows.append({"stage": failed[0], "outcome": failed[1]})
    with never_fatal():
        create_table_artifact(
            key="stages",
            table=rows,
            description="How each stage ended: Ran, Cached (up to date) or Restored (taken from DVC's cache)",
        )


def sample_grid(root: Path) -> None:
    """Show `reports/samples.png`, made smaller if it is large; nothing if there is none or it is no picture."""
    try:
        picture = _small_png(Workspace(root).reports / "samples.png")
    except OSError:
        return
    with never_fatal():
        create_markdown_artifact(
            key="samples",
            markdown=f"![samples](data:image/png;base64,{base64.b64encode(picture).decode()})",
            description="Images drawn from the EMA weights",
        )


@contextlib.contextmanager
def never_fatal() -> Iterator[None]:
    """What was computed counts; that it cannot be shown is a warning."""
    try:
        yield
    except Exception as error:
        get_run_logger().warning("An artifact is missing: %s: %s", type(error).__name__, error)


def human_size(size: float) -> str:
    """Bytes for people: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


class StageProgress:
    """Shows how far a stage is, and the MLflow run of a training, from a thread of its own.

    The stage never waits for it and never fails by it: what Prefect or MLflow do not take is left out.
    """

    def __init__(self, root: Path, stage: str) -> None:
        self._root, self._stage = root, stage
        self._key = re.sub(r"[^a-z0-9]+", "-", stage.lower()).strip("-")
        self._latest: Progress | None = None
        self._artifact: UUID | None = None
        self._wake, self._closing, self._ran = threading.Event(), threading.Event(), False
        self._training: str | None = None  # its fingerprint, once a training of this stage was seen
        self._linked, self._link_at = False, 0.0
        self._warned = False
        context = contextvars.copy_context()  # artifacts belong to the task that this is made in
        self._thread = threading.Thread(target=context.run, args=(self._work,), name="stage-progress", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_END_SECONDS if kind is None else 1.0)  # an interrupted flow has little time

    def advance(self, progress: Progress) -> None:
        """Take how far the work is; returns at once."""
        self._latest = progress
        if self._thread.ident is None:
            self._thread.start()
        self._wake.set()

    def ran(self) -> None:
        """Say that the stage ran to its end."""
        self._ran = True

    def _work(self) -> None:
        while not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            self._show()
            self._closing.wait(_UPDATE_EVERY)
        self._show()

    def _show(self) -> None:
        try:
            self._show_progress()
            now = time.monotonic()
            if not self._linked and (now >= self._link_at or self._closing.is_set()):
                self._link_at = now + _LINK_EVERY
                self._linked = self._link_run()
        except Exception as error:
            if not self._warned:
                self._warned = True
                get_run_logger().warning("Progress cannot be shown: %s: %s", type(error).__name__, error)

    def _show_progress(self) -> None:
        progress = self._latest
        if progress is None:
            return
        ended = self._closing.is_set() and self._ran
        percent = 100.0 if ended else progress.percent
        left = f", {progress.left} left" if progress.left else ""
        text = f"{progress.description}: {progress.done}/{progress.total} {progress.unit}{left}"
        text = f"{text}, {progress.note}" if progress.note else text
        if self._artifact is None:
            self._artifact = cast("UUID", create_progress_artifact(percent, key=self._key, description=text))
        else:
            update_progress_artifact(self._artifact, percent, description=text)

    def _link_run(self) -> bool:
        """Whether the run of this stage's training is linked now."""
        self._training = self._training or running_training(self._root)
        link = run_link(self._root, self._training) if self._training else None
        if link is None:
            return False
        create_link_artifact(link, link_text="MLflow run", key="mlflow-run", description="Curves and parameters")
        return True


def running_training(root: Path) -> str | None:
    """The fingerprint of the training that a process of the project at `root` is busy with: it holds that lock."""
    for lock in Workspace(root).checkpoints.glob("*/lock"):
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            if Path(psutil.Process(int(lock.read_text())).cwd()).samefile(root):
                return lock.parent.name
    return None


def run_link(root: Path, fingerprint: str) -> str | None:
    """Where MLflow shows the run of a training; None without a server, or if the run is not there (yet)."""
    from darkroom.registry.runs import find_run
    from darkroom.registry.tracking import connect, tracking_uri

    workspace = Workspace(root)
    parts = urlsplit(tracking_uri(workspace))
    if parts.scheme not in ("http", "https"):
        return None
    try:
        client = connect(workspace)
        experiment = client.get_experiment_by_name(workspace.params().registry.name)
        run = find_run(client, experiment.experiment_id, fingerprint) if experiment else None
    except (InputError, StageFailed):
        return None
    if experiment is None or run is None:
        return None
    server = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
    return f"{server}/#/experiments/{experiment.experiment_id}/runs/{run}"


def _small_png(path: Path) -> bytes:
    """The picture as a PNG of at most `PICTURE_BYTES`. Raises OSError if there is none."""
    from PIL import Image

    content = path.read_bytes()
    with Image.open(path) as image:
        picture = image.convert("RGB")
    while len(content) > PICTURE_BYTES:
        picture = picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        content = buffer.getvalue()
    return content
