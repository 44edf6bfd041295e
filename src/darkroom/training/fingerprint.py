"""The training fingerprint: a digest of everything that decides what a training computes."""

from pathlib import Path

from darkroom.files import digest_json, digest_tree
from darkroom.params import TrainParams

# What training computes with, and the form of its checkpoints. What is around it (progress, logging, MLflow, mirrors,
# the files that are written at the end) can change without a new fingerprint.
_PACKAGE = Path(__file__).resolve().parents[1]
CODE = (
    "data/dataset.py",
    "diffusion/card.py",
    "diffusion/objective.py",
    "diffusion/pixels.py",
    "diffusion/schedules.py",
    "nets/unet.py",
    "philox.py",
    "randomness.py",
    "training/batches.py",
    "training/checkpoints.py",
    "training/distributed.py",
    "training/ema.py",
    "training/hostcopy.py",
    "training/kernels.py",
    "training/loop.py",
    "training/setup.py",
    "training/snapshots.py",
    "training/state.py",
    "training/streaming.py",
    "training/ticks.py",
)


def training_fingerprint(params: TrainParams, data_digest: str) -> str:
    """sha256 over parameters, prepared data and code: 64 hexadecimal digits.

    Equal fingerprints train equal weights on one kind of device. In which arithmetic a bf16 recipe computes is the
    device's matter (`darkroom.arithmetic`); it is kept with the checkpoints and recorded in `run.json`.
    """
    code = digest_tree(_PACKAGE, [_PACKAGE / part for part in CODE])
    return digest_json({"code": code, "data": data_digest, "params": params.model_dump()})
