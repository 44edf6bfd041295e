"""Prefect's server behind a guard, which its own command cannot have: `python -m flows.stack.prefect_server HOST PORT`.

Settings come from the environment: PREFECT_SERVER_API_AUTH_STRING is the password, without which it does not start.
"""

import sys


def main(arguments: list[str]) -> int:
    """Serve until a signal ends it; 2 without a password."""
    import uvicorn
    from prefect.logging.configuration import setup_logging
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    from flows.stack.guard import Guard

    settings = get_current_settings().server
    if not settings.api.auth_string:
        print("PREFECT_SERVER_API_AUTH_STRING is not set: expected the server's password", file=sys.stderr)
        return 2
    host, port = arguments
    setup_logging()
    uvicorn.run(
        Guard(create_app(final=True)),
        host=host,
        port=int(port),
        timeout_keep_alive=settings.api.keepalive_timeout,
        log_level=settings.logging_level.lower(),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
