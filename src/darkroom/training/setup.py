"""What a training starts from: a network with its first weights, and the source of its batches."""

import torch

from darkroom.data.dataset import DatasetInfo, Split
from darkroom.diffusion.card import build_unet
from darkroom.diffusion.schedules import make_schedule
from darkroom.nets.unet import UNet
from darkroom.params import TrainParams
from darkroom.training.batches import BatchSource, DataOrder
from darkroom.training.streaming import open_images


def set_up(params: TrainParams, info: DatasetInfo, data: Split, device: torch.device) -> tuple[UNet, BatchSource]:
    """The network and the batches on `device`, functions of the arguments alone. Close the batches after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        network = build_unet(params.model, info.image_size, info.channels, len(info.classes), params.label_dropout)
    batches = BatchSource(
        images=open_images(data, DataOrder(params.seed, len(data.labels)), device),
        alpha_bar=make_schedule(params.schedule.name, params.schedule.num_timesteps).alpha_bar.to(device),
        seed=params.seed,
        prediction=params.prediction,
        loss_weighting=params.loss_weighting,
        label_dropout=params.label_dropout,
        null_class=len(info.classes),
        horizontal_flip=params.horizontal_flip,
    )
    return network.to(device), batches
