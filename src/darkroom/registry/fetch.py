"""Getting a registered model's weights and card as files, without running the code that came with it."""

from pathlib import Path

from darkroom.diffusion.card import CARD_FILE
from darkroom.errors import InputError
from darkroom.registry.tracking import connect, current, import_mlflow, tracking_uri, unavailable_is_one_line
from darkroom.registry.versions import find_by_uri
from darkroom.workspace import Workspace


def fetch_model(workspace: Workspace, uri: str, destination: Path) -> Path:
    """Download `models:/NAME@alias` or `models:/NAME/3` to an empty directory; return the one with weights and card.

    Raises InputError if there is no such model or it is not one of ours, RegistryUnavailable if the server is down.
    """
    client, tracking = connect(workspace), tracking_uri(workspace)
    with unavailable_is_one_line(tracking), current(tracking):
        version = find_by_uri(client, uri)
        source = f"models:/{version.name}/{version.version}"  # not the alias, which can move between the two
        artifacts = import_mlflow().artifacts
        package = Path(artifacts.download_artifacts(artifact_uri=source, dst_path=str(destination)))
    found = sorted(package.rglob(CARD_FILE))
    if len(found) != 1:
        raise InputError(
            f"{uri}: holds no {CARD_FILE}; `darkroom status` names the models that this project registered"
        )
    return found[0].parent
