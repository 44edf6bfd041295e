"""The slots of the GPUs: a concurrency limit on the Prefect server, of which a run holds one while it computes."""

import contextlib
import threading
from collections.abc import Iterator

from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.logging.loggers import get_logger, get_run_logger

from darkroom.errors import InputError
from flows.settings import Settings

LEASE_SECONDS = 60.0  # after kill -9 of a run its slot is free again after this; renewed while the run lives
_SAY_AFTER = 2.0  # seconds of waiting


@contextlib.contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold a slot of the limit `DARKROOM_GPU_LIMIT` names, waiting until one is free; without it nothing is held.

    Never nested: a run that holds the last slot would wait for itself. Raises InputError if there is no such limit.
    """
    limit = Settings.from_environment().gpu_limit
    if limit is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        with _saying_that_it_waits(limit), _missing_is_bad_input(limit):
            # Strict about a limit that is missing; but a server that is away for a while must not end a long training.
            held = concurrency(
                limit, occupy=1, strict=True, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False
            )
            stack.enter_context(held)
        yield


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
def _saying_that_it_waits(limit: str) -> Iterator[None]:
    try:
        logger = get_run_logger()
    except Exception:  # outside of a run
        logger = get_logger("limits")
    timer = threading.Timer(_SAY_AFTER, lambda: logger.info("Waiting for a free slot of %r", limit))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
