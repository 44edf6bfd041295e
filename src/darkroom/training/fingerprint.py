"""The training fingerprint: a digest of everything that decides what a training computes."""

from pathlib import Path

from darkroom.files import digest_json, digest_tree
from darkroom.params import TrainParams

# What training computes with. The stage around it (progress, logging, MLflow) can change without a new fingerprint.
_PACKAGE = Path(__file__).resolve().parents[1]
CODE = (
    "data/dataset.py",
    "diffusion/card.py",
    "diffusion/objective.py",
    "diffusion/pixels.py",
    "diffusion/schedules.py",
    "nets/unet.py",
    "randomness.py",
    "training",
)


def training_fingerprint(params: TrainParams, data_digest: str) -> str:
    """sha256 over parameters, prepared data and code: 64 hexadecimal digits. Equal fingerprints train equal weights."""
    code = digest_tree(_PACKAGE, [_PACKAGE / part for part in CODE])
    return digest_json({"code": code, "data": data_digest, "params": params.model_dump()})
