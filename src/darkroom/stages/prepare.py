"""prepare: read the source, decode every image, split, pack."""

import logging

from darkroom.data.packing import pack
from darkroom.data.sources import open_source
from darkroom.params import BUILT_IN
from darkroom.progress import signs_of_life
from darkroom.stages.runner import main
from darkroom.workspace import Workspace

log = logging.getLogger("darkroom.stages.prepare")  # run with -m, the module is called __main__


def run(workspace: Workspace) -> None:
    """Write `data/prepared`. Raises InputError for a source that cannot be used as it is declared."""
    params = workspace.params().data
    _warn_if_unwatched(params.source, workspace)
    scratch = workspace.state / "prepare"
    with signs_of_life("listing the images"):
        source = open_source(params, workspace.root, workspace.raw, scratch)
    classes = f"{len(source.classes)} classes" if source.classes else "no classes"
    log.info("%s (%s): %s images, %s", source.name, source.form, f"{len(source.paths):,}", classes)
    info = pack(source, params, workspace.prepared, scratch)
    bad = len(source.paths) - sum(info.splits.values())
    log.info(
        "packed %s train and %s test images of %s x %s x %s, digest %s",
        f"{info.splits['train']:,}",
        f"{info.splits['test']:,}",
        info.channels,
        info.image_size,
        info.image_size,
        info.digest[:12],
    )
    if bad:
        log.warning("%s images could not be decoded; the validate stage names them", f"{bad:,}")


def _warn_if_unwatched(source: str, workspace: Workspace) -> None:
    """DVC compares data/raw; a bucket or a folder elsewhere may change without prepare running again."""
    inside = (workspace.root / source).resolve().is_relative_to(workspace.raw.resolve())
    if source in BUILT_IN or (inside and "://" not in source):
        return
    if source.startswith("s3://"):
        log.warning("%s: after a change there, run `darkroom data sync` before `dvc repro`", source)
    else:
        log.warning("%s is outside data/raw: after a change there, run `dvc repro --force prepare`", source)


if __name__ == "__main__":
    main(run)
