"""What the stack consists of: each service with its command, its environment and how one knows that it is well."""

import signal
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from flows.processes import environment
from flows.stack.database import Postgres, find_postgres, sqlite_file
from flows.stack.s3 import HEALTH
from flows.stack.settings import HOST, StackSettings

_SIGN_IN = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
_NOT_FOR_ALL = ("POSTGRES_PASSWORD", "PREFECT_API_AUTH_STRING")


@dataclass(frozen=True)
class Service:
    """One process of the stack, or a command that has to succeed once (`once`) before others start."""

    name: str
    command: list[str]
    environment: dict[str, str]
    healthy: Callable[[], bool] = lambda: True
    needs: tuple[str, ...] = ()  # services that have to be well before it starts
    port: str | None = None  # the variable that has it
    shows: str = ""  # for a person: what is to be found where
    prepare: Callable[[], None] = lambda: None  # before each start
    once: bool = False
    user: str | None = None
    stop: signal.Signals = signal.SIGTERM
    grace: float = 10.0  # seconds from `stop` to SIGKILL


def services(settings: StackSettings) -> list[Service]:
    """The stack, each service after those that it needs; they are stopped in reverse order."""
    postgres = find_postgres(settings)
    local_s3 = not settings.values.get("AWS_ENDPOINT_URL")
    return [
        *([_postgres(postgres)] if postgres else []),
        *([_s3(settings)] if local_s3 else []),
        _mlflow(settings, postgres),
        _prefect(settings, postgres),
        _set_up(settings),
        _worker(settings),
    ]


def client_environment(settings: StackSettings) -> dict[str, str]:
    """What a program needs to use the stack: the worker, its runs, and a person's shell."""
    return {
        "DARKROOM_GPU_LIMIT": settings["DARKROOM_GPU_LIMIT"],
        "DARKROOM_POOL": settings["DARKROOM_POOL"],
        "DARKROOM_PROJECT": str(settings.root),
        "DARKROOM_STATE": str(settings.state),
        "MLFLOW_TRACKING_URI": settings.url("MLFLOW_PORT"),
        "PREFECT_API_AUTH_STRING": settings["PREFECT_API_AUTH_STRING"],
        "PREFECT_API_URL": f"{settings.url('PREFECT_PORT')}/api",
        "AWS_ENDPOINT_URL": settings.values.get("AWS_ENDPOINT_URL") or settings.url("S3_PORT"),
        **{name: settings.values[name] for name in _SIGN_IN if name in settings.values},
    }


def _environment(settings: StackSettings, **values: str) -> dict[str, str]:
    quiet = {
        "AWS_EC2_METADATA_DISABLED": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_HOME": str(settings.directory / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    given = {name: value for name, value in environment(settings.root).items() if name not in _NOT_FOR_ALL}
    inherited = {name: value for name, value in settings.values.items() if name not in _NOT_FOR_ALL}
    return inherited | given | quiet | values


def _postgres(postgres: Postgres) -> Service:
    return Service(
        name="postgres",
        command=postgres.command,
        environment={"LC_ALL": "C", "PATH": str(postgres.binaries)},
        healthy=postgres.answers,
        port="POSTGRES_PORT",
        shows=f"{HOST}:{postgres.settings['POSTGRES_PORT']}, data in {postgres.data}",
        prepare=postgres.prepare,
        user=postgres.user,
        stop=signal.SIGINT,  # "fast": it ends its clients' sessions instead of waiting for them
        grace=20.0,
    )


def _s3(settings: StackSettings) -> Service:
    url = settings.url("S3_PORT")
    values = {name: settings[name] for name in ("S3_PORT", "S3_BUCKET", "AWS_ACCESS_KEY_ID")}
    return Service(
        name="s3",
        command=[sys.executable, "-m", "flows.stack.s3", str(settings.directory / "s3")],
        environment=_environment(settings, **values),
        healthy=lambda: _answers(f"{url}{HEALTH}"),
        port="S3_PORT",
        shows=f"{url}, a test server for incoming data: bucket s3://{settings['S3_BUCKET']}",
    )


def _mlflow(settings: StackSettings, postgres: Postgres | None) -> Service:
    url = settings.url("MLFLOW_PORT")
    uri = postgres.uri("mlflow") if postgres else f"sqlite:///{sqlite_file(settings, 'mlflow')}"
    server = [sys.executable, "-m", "flows.stack.mlflow_server", "--host", HOST, "--port", settings["MLFLOW_PORT"]]
    artifacts = settings.directory / "mlflow-artifacts"
    values = {
        "MLFLOW_BACKEND_STORE_URI": uri,  # not in the command, where every user of the machine could read the password
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_TRACKING_URI": "",
    }
    return Service(
        name="mlflow",
        command=[
            *server,
            "--workers",
            "1",
            "--uvicorn-opts",
            "--no-access-log",
            "--artifacts-destination",
            str(artifacts),
            "--allowed-hosts",
            f"{HOST}:*,localhost:*",
            "--x-frame-options",
            "DENY",
        ],
        environment=_environment(settings, **values),
        healthy=lambda: _answers(f"{url}/health"),
        needs=("postgres",) if postgres else (),
        port="MLFLOW_PORT",
        shows=f"{url}, artifacts in {artifacts}",
    )


def _prefect(settings: StackSettings, postgres: Postgres | None) -> Service:
    url = settings.url("PREFECT_PORT")
    server = [sys.executable, "-m", "flows.stack.prefect_server"]
    sqlite = f"sqlite+aiosqlite:///{sqlite_file(settings, 'prefect')}"
    uri = postgres.uri("prefect", "postgresql+asyncpg") if postgres else sqlite
    return Service(
        name="prefect",
        command=[*server, HOST, settings["PREFECT_PORT"]],
        environment=_environment(
            settings,
            # In memory, as is the default, a restart would forget who holds which slot: runs under way would end.
            PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE="prefect.server.concurrency.lease_storage.filesystem",
            PREFECT_SERVER_API_AUTH_STRING=settings["PREFECT_API_AUTH_STRING"],
            PREFECT_SERVER_CORS_ALLOWED_ORIGINS=url,
            PREFECT_SERVER_CSRF_PROTECTION_ENABLED="true",
            PREFECT_SERVER_DATABASE_CONNECTION_URL=uri,
            PREFECT_SERVER_UI_API_URL="/api",  # of whatever name and port the page came from
            PREFECT_UI_URL=url,
        ),
        healthy=lambda: _answers(f"{url}/api/health"),
        needs=("postgres",) if postgres else (),
        port="PREFECT_PORT",
        shows=url,
    )


def _set_up(settings: StackSettings) -> Service:
    return Service(
        name="set-up",
        command=[sys.executable, "-m", "flows.deploy"],
        environment=_environment(settings, **client_environment(settings)),
        needs=("prefect",),
        shows=f"prefect.yaml in pool {settings['DARKROOM_POOL']}, at once: limit {settings['DARKROOM_GPU_LIMIT']}",
        once=True,
    )


def _worker(settings: StackSettings) -> Service:
    listens = {"PREFECT_WORKER_WEBSERVER_HOST": HOST, "PREFECT_WORKER_WEBSERVER_PORT": settings["WORKER_PORT"]}
    return Service(
        name="worker",
        command=[sys.executable, "-m", "flows.stack.worker"],
        environment=_environment(settings, **client_environment(settings), **listens),
        healthy=lambda: _answers(f"{settings.url('WORKER_PORT')}/health"),
        needs=("mlflow", "set-up"),
        port="WORKER_PORT",
        shows=f"takes runs of pool {settings['DARKROOM_POOL']}, one after the other on a GPU",
        grace=45.0,  # its runs save
    )


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
