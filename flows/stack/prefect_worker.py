"""Prefect's command, whose workers know no job variable but those that the pool declares.

The server refuses others in a run that is made from a deployment, but not on every way to make one; and Prefect's own
worker passes any `env` on, declared or not.
"""

import sys
from typing import Any


def main() -> None:
    """Prefect's own command, with its arguments."""
    from prefect.cli import app
    from prefect.workers.base import BaseJobConfiguration

    original = BaseJobConfiguration.from_template_and_values.__func__  # type: ignore[attr-defined]

    async def from_declared(
        cls: type[BaseJobConfiguration], base_job_template: dict[str, Any], values: dict[str, Any], client: Any = None
    ) -> Any:
        return await original(cls, base_job_template, declared(base_job_template, values), client=client)

    BaseJobConfiguration.from_template_and_values = classmethod(from_declared)  # type: ignore[assignment]
    app()


def declared(template: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The job variables that a pool's template has; `env.NAME` is a part of `env`."""
    known = template["variables"].get("properties", {})
    return {name: value for name, value in values.items() if name.partition(".")[0] in known}


if __name__ == "__main__":
    sys.exit(main())  # type: ignore[func-returns-value]
