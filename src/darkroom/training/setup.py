"""What a training starts from: a network with its first weights, and the source of its batches."""

import torch

from darkroom.data.dataset import DatasetInfo, Split
from darkroom.diffusion.model import build_unet
from darkroom.diffusion.schedules import make_schedule
from darkroom.nets.unet import UNet
from darkroom.params import TrainParams
from darkroom.training.batches import BatchSource, DataOrder


def set_up(params: TrainParams, info: DatasetInfo, data: Split, device: torch.device) -> tuple[UNet, BatchSource]:
    """The network and the batches on `device`, functions of the arguments alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        network = build_unet(params.model, info.image_size, info.channels, len(info.classes), params.label_dropout)
    batches = BatchSource(
        images=torch.tensor(data.images, device=device),
        labels=torch.tensor(data.labels, device=device),
        alpha_bar=make_schedule(params.schedule.name, params.schedule.num_timesteps).alpha_bar.to(device),
        order=DataOrder(params.seed, len(data.labels)),
        seed=params.seed,
        label_dropout=params.label_dropout,
        null_class=len(info.classes),
        horizontal_flip=params.horizontal_flip,
    )
    return network.to(device), batches
