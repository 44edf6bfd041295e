"""What a trained model is, beside its weights: `model.json`, and the network that it describes."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from darkroom.diffusion.objective import Prediction
from darkroom.nets.unet import UNet
from darkroom.params import ScheduleParams, UNetParams

WEIGHTS_FILE = "ema.safetensors"
CARD_FILE = "model.json"


class ModelCard(BaseModel):
    """`model.json`: with the weights beside it, all that a model is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    image_size: int
    channels: int
    classes: list[str]  # names; the index is the label; empty: unconditional, every label is 0
    unet: UNetParams
    schedule: ScheduleParams
    prediction: Prediction = "eps"  # the cards of older models do not name it
    label_dropout: float
    fingerprint: str  # of the training
    data_digest: str
    weights_digest: str  # sha256 of ema.safetensors

    @property
    def num_labels(self) -> int:
        """How many different labels an image can be drawn for: the classes, or 0 alone where there are none."""
        return max(len(self.classes), 1)

    @property
    def null_class(self) -> int | None:
        """The label that stands for none; there is one exactly when labels were dropped in training."""
        return len(self.classes) if self.label_dropout > 0 else None

    def build(self) -> UNet:
        """The network, with fresh weights."""
        return build_unet(self.unet, self.image_size, self.channels, len(self.classes), self.label_dropout)


def build_unet(unet: UNetParams, image_size: int, channels: int, num_classes: int, label_dropout: float) -> UNet:
    """The UNet that `train.model` in params.yaml describes, for images and labels of the prepared data."""
    return UNet(
        image_size=image_size,
        image_channels=channels,
        num_classes=num_classes,
        null_class=label_dropout > 0,
        **unet.model_dump(),
    )
