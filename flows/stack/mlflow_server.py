"""MLflow's server on a database whose tables are up to date: `python -m flows.stack.mlflow_server`, then its options.

MLFLOW_BACKEND_STORE_URI names the database: a command's arguments, and a password in them, can be read by every user of
the machine. The tables come first: MLflow's own first use of an empty database crashes when two do it at once.
"""

import os
import sys


def main(arguments: list[str]) -> int:
    """Serve until a signal ends it."""
    from mlflow.cli import cli

    cli(["db", "upgrade", os.environ["MLFLOW_BACKEND_STORE_URI"]], standalone_mode=False)
    cli(["server", *arguments])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
