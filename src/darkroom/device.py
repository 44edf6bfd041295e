"""The device to compute on. It is a matter of the machine, so it comes from the environment, never from params.yaml."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from darkroom.errors import InputError, StageFailed


def choose_device() -> torch.device:
    """`DARKROOM_DEVICE`, or the GPU if there is one. Raises InputError for a device that is not there."""
    name = os.environ.get("DARKROOM_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            _repeat_exactly()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"DARKROOM_DEVICE = {name!r}: {str(error).splitlines()[0]}") from None
    return device


def waiting_for(device: torch.device) -> Callable[[], None]:
    """What returns when `device` has done all that it was asked for."""
    return lambda: torch.cuda.synchronize(device) if device.type == "cuda" else None


def _repeat_exactly() -> None:
    """Let CUDA compute the same bits each time, and fp32 be fp32: a resumed training has to equal an unbroken one.

    Operations that have no deterministic form warn, here; training is stricter (`training.loop`).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Otherwise all memory is written twice, which no valid program can tell.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def memory_explained(device: torch.device, images: int) -> Iterator[None]:
    """Say in one line what to do when the memory of `device` is too small for `images` at once."""
    try:
        yield
    except RuntimeError as error:  # torch has a class of its own for a GPU's memory only
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        less = (
            f"DARKROOM_MICRO_BATCH={images // 2} takes less and trains the same"
            if images > 1
            else "it needs a larger one"
        )
        raise StageFailed(
            f"out of memory on {device} with {images} images at once; {less}; checkpoints are kept"
        ) from None
