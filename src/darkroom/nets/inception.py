"""InceptionV3 as FID defines it: the TensorFlow graph of 2015-12-05 in torch, with the names of the public weights.

The network is that of Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision". Published FIDs
(Heusel et al. 2017) come from one trained graph of it, which departs from the paper in three places, kept here: average
pools leave padding out of the mean, the last block pools by the maximum, and images are resized without half-pixel
centres. Any other Inception gives other scores.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from darkroom.errors import InputError
from darkroom.files import replacing

SIZE = 299  # pixels: the side at which the network looks at every image
_CPU_BATCH, _BATCH = 8, 64  # images that are in the network at a time; a CPU loses speed beyond what its caches hold


class InceptionV3(nn.Module):
    """Maps uint8 images (N, 1 or 3, H, W) of any size to float32 features (N, 2048), non-negative.

    It is frozen and stays in evaluation mode. Its weights are those of `load_inception`; a fresh one has random ones.
    """

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = InceptionA(192, pool_features=32)
        self.Mixed_5c = InceptionA(256, pool_features=64)
        self.Mixed_5d = InceptionA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, channels_7x7=128)
        self.Mixed_6c = InceptionC(768, channels_7x7=160)
        self.Mixed_6d = InceptionC(768, channels_7x7=160)
        self.Mixed_6e = InceptionC(768, channels_7x7=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, pool=average_pool)
        self.Mixed_7c = InceptionE(2048, pool=max_pool)
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "InceptionV3":
        """Stay in evaluation mode, also inside a module that trains."""
        return super().train(False)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Pooled activations, float32 (N, 2048), of uint8 `images` (N, C, H, W); one channel counts as grey.

        After `.double()` they are computed in float64. Autocast does not reach them. On CUDA, convolutions are in full
        float32 only while TF32 is off, as `darkroom.device` leaves it. Raises ValueError for images of another form.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"expected uint8 (N, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
        at_once = _CPU_BATCH if images.device.type == "cpu" else _BATCH
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._pooled(batch) for batch in torch.split(images, at_once)])

    def forward(self, images: Tensor) -> Tensor:
        """`features`, so that a metric can take this as its network."""
        return self.features(images)

    def _pooled(self, images: Tensor) -> Tensor:
        x = resize(images.to(self.fc.weight.dtype), SIZE)
        x = ((x - 128) / 128).expand(-1, 3, -1, -1)
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)  # a third faster there
        x = self.Conv2d_1a_3x3(x)  # (N, 32, 149, 149)
        x = self.Conv2d_2a_3x3(x)
        x = self.Conv2d_2b_3x3(x)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 64, 73, 73)
        x = self.Conv2d_3b_1x1(x)
        x = self.Conv2d_4a_3x3(x)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 192, 35, 35)
        x = self.Mixed_5b(x)
        x = self.Mixed_5c(x)
        x = self.Mixed_5d(x)
        x = self.Mixed_6a(x)  # (N, 768, 17, 17)
        x = self.Mixed_6b(x)
        x = self.Mixed_6c(x)
        x = self.Mixed_6d(x)
        x = self.Mixed_6e(x)
        x = self.Mixed_7a(x)  # (N, 1280, 8, 8)
        x = self.Mixed_7b(x)
        x = self.Mixed_7c(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def resize(images: Tensor, size: int) -> Tensor:
    """Floating point (N, C, H, W) to (N, C, size, size) as `tf.image.resize_bilinear` of TensorFlow 1 does by default.

    Output pixel i lies at i * H / size of the input: no half-pixel centres, corners not aligned. Nothing is smoothed
    when the image shrinks.
    """
    left, right, across = _neighbours(images.shape[3], size, images.device)
    rows = _between(images[..., left], images[..., right], across)
    above, below, down = _neighbours(images.shape[2], size, images.device)
    return _between(rows[:, :, above], rows[:, :, below], down[:, None])


def _neighbours(inputs: int, outputs: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each output pixel along one side: the input pixels around it, and how far it is from first to second."""
    scale = torch.tensor(inputs, dtype=torch.float32) / outputs  # rounded to float32, as TensorFlow's is
    position = torch.arange(outputs, dtype=torch.float32, device=device) * scale.item()
    first = position.long()
    return first, (first + 1).clamp_max(inputs - 1), position - first


def _between(first: Tensor, second: Tensor, distance: Tensor) -> Tensor:
    # torch.lerp rounds otherwise.
    return first + (second - first) * distance


def average_pool(x: Tensor) -> Tensor:
    """Mean over 3x3 at the same size; what lies outside does not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    """Maximum over 3x3 at the same size."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BasicConv2d(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionA(nn.Module):
    """Branches 1x1, 5x5, twice 3x3 and pooled side by side: 224 + `pool_features` channels at the same size."""

    def __init__(self, in_channels: int, pool_features: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(in_channels, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(in_channels, pool_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([branch1x1, branch5x5, branch3x3dbl, branch_pool], 1)


class InceptionB(nn.Module):
    """Halves the sides: 3x3, twice 3x3 and the pooled input, 480 + `in_channels` channels."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3(x)
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([branch3x3, branch3x3dbl, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """Branches 1x1, 7x7 and twice 7x7 in factors, and pooled: 768 channels at the same size."""

    def __init__(self, in_channels: int, channels_7x7: int) -> None:
        super().__init__()
        c7 = channels_7x7
        self.branch1x1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7_1 = BasicConv2d(in_channels, c7, 1)
        self.branch7x7_2 = BasicConv2d(c7, c7, (1, 7), padding=(0, 3))
        self.branch7x7_3 = BasicConv2d(c7, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = BasicConv2d(in_channels, c7, 1)
        self.branch7x7dbl_2 = BasicConv2d(c7, c7, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = BasicConv2d(c7, c7, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = BasicConv2d(c7, c7, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = BasicConv2d(c7, 192, (1, 7), padding=(0, 3))
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([branch1x1, branch7x7, branch7x7dbl, branch_pool], 1)


class InceptionD(nn.Module):
    """Halves the sides: 3x3, 7x7 in factors with 3x3, and the pooled input, 512 + `in_channels` channels."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_2(self.branch7x7x3_1(x))
        branch7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(branch7x7x3))
        return torch.cat([branch3x3, branch7x7x3, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """Branches 1x1, 3x3 and twice 3x3 that fan out into 1x3 and 3x1, and pooled: 2048 channels at the same size."""

    def __init__(self, in_channels: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = BasicConv2d(in_channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(in_channels, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch3x3 = self.branch3x3_1(x)
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            branch1x1,
            self.branch3x3_2a(branch3x3),
            self.branch3x3_2b(branch3x3),
            self.branch3x3dbl_3a(branch3x3dbl),
            self.branch3x3dbl_3b(branch3x3dbl),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, 1)


def load_inception(path: Path) -> InceptionV3:
    """The network with the weights of a file, safetensors or torch's own whatever its name; nothing in it is run.

    Whether it is the right file is the caller's to know, by its digest. Raises InputError for one that cannot be read
    or is not exactly this network's weights, naming the first difference.
    """
    tensors = _read(path)
    with torch.device("meta"):  # random weights for 24 M parameters take longer than reading the right ones
        model = InceptionV3()
    expected = model.state_dict()
    for name, tensor in expected.items():
        found = tensors.get(name)
        if not isinstance(found, Tensor):
            raise InputError(f"{path}: holds no tensor {name!r}: not the weights of FID's InceptionV3")
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise InputError(f"{path}: {name} is {_form(found)}, FID's InceptionV3 has {_form(tensor)}")
        if not found.isfinite().all():
            raise InputError(f"{path}: {name} is not finite everywhere: the file is damaged")
    if unknown := sorted(map(str, tensors.keys() - expected.keys())):
        raise InputError(f"{path}: holds {unknown[0]!r}, which FID's InceptionV3 does not have")
    model.load_state_dict(tensors, assign=True)
    return model


def save_inception(model: InceptionV3, path: Path) -> None:
    """Write the weights as safetensors, whole or not at all; equal weights give equal bytes."""
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # behind the length of its header, which is JSON
        tensors = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch.load raises nearly anything for a damaged file
        raise InputError(f"{path}: is no file of weights that can be read safely ({type(error).__name__})") from None
    if not isinstance(tensors, dict):
        raise InputError(f"{path}: holds {type(tensors).__name__}, expected tensors by name")
    return tensors


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
