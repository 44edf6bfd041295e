"""Which device to compute on: a matter of the machine, so it comes from the environment and never from params.yaml."""

import os

import torch

from darkroom.errors import InputError


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


def _repeat_exactly() -> None:
    """Let CUDA compute the same bits each time, and fp32 be fp32: a resumed training has to equal an unbroken one.

    Operations that have no deterministic form warn.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
