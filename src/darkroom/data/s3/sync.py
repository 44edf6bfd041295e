"""Bringing `data/raw` up to date with a bucket, without preparing anything."""

from darkroom.data.s3.fetching import Synced as Synced
from darkroom.data.s3.fetching import update
from darkroom.errors import InputError
from darkroom.workspace import Workspace


def sync(workspace: Workspace) -> Synced:
    """Fetch what is new or changed below `data.source`, remove what is gone, and say how much that was.

    DVC compares `data/raw`, so after a change `dvc repro` prepares again. Raises InputError for a source that is not on
    S3 or cannot be fetched.
    """
    source = workspace.params().data.source
    if not source.startswith("s3://"):
        raise InputError(f"params.yaml: data.source = {source!r}: nothing to sync; expected s3://bucket/prefix")
    return update(source, workspace.raw)
