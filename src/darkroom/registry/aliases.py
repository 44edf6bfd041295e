"""The aliases of a registered model: which version each points to, and how they move together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from darkroom.errors import StageFailed

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"

NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # what MLflow says of an alias, version or model


@dataclass(frozen=True)
class Aliases:
    """Version numbers, None for an alias that is not set."""

    champion: str | None
    previous: str | None
    challenger: str | None


def version_at(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    """The version that an alias points to."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in NOT_THERE:
            return None
        raise


def read_aliases(client: "MlflowClient", name: str) -> Aliases:
    """Where the three aliases point to now; nowhere if there is no such model yet."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        found = {}
    numbers = {alias: str(version) for alias, version in found.items()}
    return Aliases(numbers.get(CHAMPION), numbers.get(PREVIOUS), numbers.get(CHALLENGER))


def point(client: "MlflowClient", name: str, alias: str, version: str | None) -> None:
    """Set an alias, or remove it."""
    if version is None:
        client.delete_registered_model_alias(name, alias)
    else:
        client.set_registered_model_alias(name, alias, version)


def serve(client: "MlflowClient", name: str, champion: str | None, previous: str | None) -> None:
    """Move `@champion` and `@previous`, and read both back.

    `@champion` moves in one step, so that something serves at every moment, and the two are never one version. Raises
    StageFailed if the registry does not hold what was written.
    """
    now = read_aliases(client, name)
    if champion is not None and now.previous == champion:
        point(client, name, PREVIOUS, None)
    if now.champion != champion:
        point(client, name, CHAMPION, champion)
    if now.previous != previous or now.previous == champion:
        point(client, name, PREVIOUS, previous)
    after = read_aliases(client, name)
    if (after.champion, after.previous) != (champion, previous):
        raise StageFailed(
            f"model {name!r}: set @{CHAMPION} to {champion} and @{PREVIOUS} to {previous}, "
            f"and the registry has {after.champion} and {after.previous}"
        )
