"""Set up a Prefect server: `python -m flows.deploy`, again and again, and it is what this checkout says.

A work pool with its job template, the limit of runs that compute at once, the automations that notice runs which died,
and the deployments of `prefect.yaml`. PREFECT_API_URL says where; DARKROOM_POOL and DARKROOM_GPU_LIMIT are the names.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom.errors import InputError, StageFailed
from darkroom.files import digest_bytes, digest_tree, read_json
from darkroom.workspace import Workspace
from flows.automations import set_automations
from flows.processes import run

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

POOLS = ("process", "docker", "kubernetes")
_PACKAGES = {"docker": "prefect_docker", "kubernetes": "prefect_kubernetes"}


def main() -> int:
    """0 done; 1 if the server does not answer or refuses; 2 for a wrong setting."""
    try:
        workspace = Workspace.find()
        pool = pool_name()
        with _client() as client:
            for line in (
                set_pool(client, pool, workspace.root / "flows" / "pools" / f"{pool}.json"),
                set_limit(client, os.environ.get("DARKROOM_GPU_LIMIT") or "gpu", count_gpus() or 1),
                *set_automations(client, pool, timedelta(seconds=heartbeat()), os.environ.get("DARKROOM_WEBHOOK")),
                *deploy(client, workspace.root, pool),
                *look_at_leases(client),
            ):
                print(line, flush=True)
    except (InputError, StageFailed) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def pool_name() -> str:
    """The pool that deployments are made for. Raises InputError for one that is unknown, or of a type not installed."""
    pool = os.environ.get("DARKROOM_POOL") or "process"
    if pool not in POOLS:
        raise InputError(f"DARKROOM_POOL = {pool!r}: expected one of {', '.join(POOLS)}")
    package = _PACKAGES.get(pool)
    if package is not None and importlib.util.find_spec(package) is None:
        raise InputError(f"DARKROOM_POOL = {pool!r} needs {package}: pip install 'darkroom[{pool}]'")
    return pool


@contextlib.contextmanager
def _client() -> "Iterator[SyncPrefectClient]":
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise InputError(
            "PREFECT_API_URL is not set: expected the address of a Prefect server, such as `make stack` has"
        )
    with get_client(sync_client=True) as client:
        try:
            client.hello().raise_for_status()
        except (httpx.HTTPError, PrefectHTTPStatusError) as error:
            hint = "; PREFECT_API_AUTH_STRING has to be its password" if "401" in str(error) else ""
            raise StageFailed(f"PREFECT_API_URL = {url}: no Prefect server answers there: {error}{hint}") from error
        yield client


def set_pool(client: "SyncPrefectClient", name: str, template: Path) -> str:
    """Create the work pool, or give it the job template of this checkout."""
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    content = read_json(template)
    # Whatever a worker's own settings: the automation that misses the beats counts on this many.
    content["job_configuration"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = str(heartbeat())
    try:
        before = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type=name, base_job_template=content))
        return f"pool {name}: created"
    if before.type != name:
        raise InputError(f"pool {name}: is of type {before.type} on the server; expected {name}: delete it there")
    if before.base_job_template == content:
        return f"pool {name}: as it was"
    client.update_work_pool(name, WorkPoolUpdate(base_job_template=content))
    return f"pool {name}: job template updated"


def heartbeat() -> int:
    """Seconds between two signs of life of a run. Raises InputError if there are to be none."""
    from prefect.settings import get_current_settings

    beat = get_current_settings().flows.heartbeat_frequency
    if beat is None:
        raise InputError("PREFECT_FLOWS_HEARTBEAT_FREQUENCY is empty: expected seconds, at least 30")
    return beat


def set_limit(client: "SyncPrefectClient", name: str, slots: int) -> str:
    """Create the concurrency limit. One that exists keeps its number of slots: another host or a person has set it."""
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
    from prefect.exceptions import ObjectNotFound

    try:
        before = client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=slots))
        return f"limit {name}: created, {slots} at once"
    if before.active:
        return f"limit {name}: as it was, {before.limit} at once"
    client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(active=True))
    return f"limit {name}: switched on, {before.limit} at once"


def look_at_leases(client: "SyncPrefectClient") -> list[str]:
    """A warning where the server keeps in memory who holds a slot; nothing where it does not say (Prefect Cloud)."""
    import httpx

    try:
        settings = client._client.get("/admin/settings").json()
        storage = str(settings["server"]["concurrency"]["lease_storage"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return []
    if not storage.endswith(".memory"):
        return []
    return [
        "warning: this server forgets at a restart who holds a slot: runs under way end, and slots stay taken; set "
        f"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE={storage.removesuffix('memory')}filesystem for it"
    ]


def count_gpus() -> int:
    """GPUs of this host."""
    import torch

    return torch.cuda.device_count()


def deploy(client: "SyncPrefectClient", root: Path, pool: str) -> list[str]:
    """Create or update the deployments of `prefect.yaml`, by Prefect's command, unless they are up to date.

    What was changed on the server since, a schedule that was paused for instance, then stays. Raises StageFailed with
    what the command says.
    """
    names = deployment_names(root / "prefect.yaml")
    version = deployed_version(root, pool)
    before = {found.name: found.version for found in client.read_deployments(limit=200)}
    if any(before.get(name) != version for name in names):
        os.environ |= {"DARKROOM_POOL": pool, "DARKROOM_DEPLOYED": version}
        ended = run([sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"], root, log=lambda _: None)
        if ended.code != 0:
            said = " ".join(line.strip(" │╭╮╰╯─") for line in ended.lines)
            raise StageFailed(f"{root / 'prefect.yaml'}: prefect deploy ended with {ended.code}: {said[-500:].strip()}")
    return [
        f"deployment {name}: "
        + ("created" if name not in before else "as it was" if before[name] == version else "updated")
        for name in names
    ]


def deployment_names(file: Path) -> list[str]:
    """The deployments of a `prefect.yaml`. Raises InputError if it is none."""
    import yaml

    try:
        return [str(entry["name"]) for entry in yaml.safe_load(file.read_text())["deployments"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{file}: expected `deployments`, a list of entries with a name: {said}") from error


def deployed_version(root: Path, pool: str) -> str:
    """Twelve digits that change with the pool, with `prefect.yaml` and with the flows, whose parameters it deploys."""
    files = [root / "prefect.yaml", *root.joinpath("flows").glob("*.py")]
    return digest_bytes(f"{pool} {digest_tree(root, files)}".encode())[:12]


if __name__ == "__main__":
    sys.exit(main())
