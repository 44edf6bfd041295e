"""MLflow's server behind a guard, on a database whose tables are up to date.

`python -m flows.stack.mlflow_server`, then the options of `mlflow server`.
MLFLOW_BACKEND_STORE_URI names the database: a command's arguments, and a password in them, can be read by every user of
the machine. The tables come first: MLflow's own first use of an empty database crashes when two do it at once.
"""

import os
import sys
from typing import Any


def main(arguments: list[str]) -> int:
    """Serve until a signal ends it."""
    import mlflow.server
    from mlflow.cli import cli

    cli(["db", "upgrade", os.environ["MLFLOW_BACKEND_STORE_URI"]], standalone_mode=False)
    # MLflow's own check lets pages of every port of this machine in, and names like 10.example.org.
    build: Any = mlflow.server._build_uvicorn_command

    def build_guarded(*given: Any, **options: Any) -> list[str]:
        return [*build(*given, **options)[:-1], "--factory", "flows.stack.mlflow_server:application"]

    mlflow.server._build_uvicorn_command = build_guarded
    cli(["server", *arguments])
    return 0


def application() -> Any:
    """MLflow's application, guarded: what uvicorn runs."""
    from mlflow.server.fastapi_app import app

    from flows.stack.guard import Guard

    return Guard(app)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
