"""Networks for these tests: recipes and small ones, with weights as if trained."""

import torch

from darkroom.nets.unet import UNet

A64 = {
    "image_size": 64,
    "image_channels": 3,
    "num_classes": 0,
    "null_class": False,
    "channels": [64, 128, 256, 512],
    "num_res_blocks": 2,
    "attention_resolutions": [16, 8],
    "head_channels": 64,
    "norm_groups": 32,
}
CIFAR = A64 | {"image_size": 32, "channels": [128, 256, 256, 256], "attention_resolutions": [16]}
SMALL = A64 | {
    "image_size": 8,
    "image_channels": 1,
    "num_classes": 10,
    "null_class": True,
    "channels": [32, 64],
    "attention_resolutions": [4],
    "head_channels": 16,
}
# Wide and large enough for every kind of convolution that inference.py may choose.
WIDE = SMALL | {
    "image_size": 32,
    "image_channels": 3,
    "channels": [64, 128, 128],
    "num_res_blocks": 1,
    "attention_resolutions": [16],
    "head_channels": 64,
}


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every weight a value, the zero-initialised ones too, so that signals keep their size."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
            parameter.data.copy_(noise)
        else:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def network(settings: dict[str, object], **changes: object) -> UNet:
    """A network in evaluation mode, with weights from a fixed seed."""
    return randomised(UNet(**(settings | changes))).eval().requires_grad_(False)


def distance(measured: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative: the norm of the difference over the norm."""
    measured, exact = measured.detach().double(), exact.detach().double()
    return float((measured - exact).norm() / exact.norm())
