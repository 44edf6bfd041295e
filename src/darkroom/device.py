"""Which device to compute on: a matter of the machine, so it comes from the environment and never from params.yaml."""

import os

import torch

from darkroom.errors import InputError


def choose_device() -> torch.device:
    """`DARKROOM_DEVICE`, or the GPU if there is one. Raises InputError for a device that is not there."""
    name = os.environ.get("DARKROOM_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"DARKROOM_DEVICE = {name!r}: {str(error).splitlines()[0]}") from None
    return device
