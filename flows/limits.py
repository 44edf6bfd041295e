"""The slots of the GPUs: a concurrency limit on the Prefect server, of which a run holds one while it computes."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.logging.loggers import get_logger, get_run_logger

from darkroom.errors import InputError, StageFailed
from flows.settings import Settings

if TYPE_CHECKING:
    import logging

    Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]

LEASE_SECONDS = 60.0  # after kill -9 of a run its slot is free again after this; renewed while the run lives
PATIENCE = (2, 4, 8, 16, 32, 64, 128, 256)  # seconds before a server that does not answer is asked again
_SAY_AFTER = 2.0  # seconds of waiting


@contextlib.contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold a slot of the limit `DARKROOM_GPU_LIMIT` names, waiting until one is free; without it nothing is held.

    Never nested: a run that holds the last slot would wait for itself. Raises InputError if there is no such limit, and
    StageFailed if the server has not answered for minutes. A server that is away later changes nothing: what was
    computed stays, and the slot's lease runs out by itself.
    """
    limit = Settings.from_environment().gpu_limit
    if limit is None:
        yield
        return
    logger, held = _logger(), contextlib.ExitStack()
    with _saying_that_it_waits(limit, logger), _missing_is_bad_input(limit):
        _take(held, limit, logger)
    try:
        yield
    finally:
        try:
            held.close()
        except httpx.HTTPError as error:
            logger.warning("The slot of %r was not given back, it lapses in %.0f s: %s", limit, LEASE_SECONDS, error)


def _take(held: contextlib.ExitStack, limit: str, logger: "Logger") -> None:
    """Acquire the slot. Prefect tries a server that does not answer again only after it has once."""
    for delay in (*PATIENCE, None):
        try:
            # Strict about a limit that is missing; but a server that is away for a while must not end a long training.
            held.enter_context(
                concurrency(
                    limit, occupy=1, strict=True, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False
                )
            )
            return
        except ConcurrencySlotAcquisitionError as error:
            cause = error.__cause__
            if not isinstance(cause, httpx.TransportError):
                raise
            if delay is None:
                raise StageFailed(f"no slot of {limit!r}: Prefect's server does not answer: {cause}") from None
            logger.warning("Prefect's server does not answer; asking again for a slot of %r in %s s", limit, delay)
            time.sleep(delay)


@contextlib.contextmanager
def _missing_is_bad_input(limit: str) -> Iterator[None]:
    try:
        yield
    except ConcurrencySlotAcquisitionError as error:
        if "must be created" not in str(error):
            raise
        raise InputError(
            f"DARKROOM_GPU_LIMIT = {limit!r}: the Prefect server has no such limit; "
            f"`prefect gcl create {limit} --limit 1` makes one"
        ) from None


@contextlib.contextmanager
def _saying_that_it_waits(limit: str, logger: "Logger") -> Iterator[None]:
    timer = threading.Timer(_SAY_AFTER, lambda: logger.info("Waiting for a free slot of %r", limit))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _logger() -> "Logger":
    try:
        return get_run_logger()
    except Exception:  # outside of a run
        return get_logger("limits")
