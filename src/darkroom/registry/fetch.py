"""Getting a registered model's weights and card as files, without running the code that came with it."""

from pathlib import Path

from darkroom.diffusion.card import CARD_FILE
from darkroom.errors import InputError
from darkroom.registry.tracking import connect, current, tracking_uri, unavailable_is_one_line
from darkroom.workspace import Workspace


def fetch_model(workspace: Workspace, uri: str, destination: Path) -> Path:
    """Download `models:/NAME@alias` or `models:/NAME/3` to an empty directory; return the one with weights and card.

    Raises InputError if there is no such model or it is not one of ours, RegistryUnavailable if the server is down.
    """
    connect(workspace)
    tracking = tracking_uri(workspace)
    with unavailable_is_one_line(tracking), current(tracking):
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            package = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(destination)))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise InputError(f"{uri}: {error.message.splitlines()[0]}") from None
    found = sorted(package.rglob(CARD_FILE))
    if len(found) != 1:
        raise InputError(
            f"{uri}: holds no {CARD_FILE}; `darkroom status` names the models that this project registered"
        )
    return found[0].parent
