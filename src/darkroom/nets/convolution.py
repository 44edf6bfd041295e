"""Convolutions of a network that no longer changes: its weights are put into the form that is fastest to apply.

All take and give channels-last tensors. On a processor three things help beyond a library's plain convolution: weights
in the layout of its kernels (`_PACKED`, the one place that calls operators without a public name), Winograd's algorithm
for wide 3x3 convolutions, and upsampling within the convolution that follows it.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_REORDER: Any = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)
_OPERATORS: Any = torch.ops.mkldnn
_NAMES = ("_convolution_pointwise", "_convolution_transpose_pointwise", "_reorder_convolution_transpose_weight")
_PACKED = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and _REORDER is not None
    and all(hasattr(_OPERATORS, name) for name in _NAMES)
)


def _packable(x: Tensor) -> bool:
    """Whether to use weights in the layout of the processor's kernels. torch.compile does the like by itself."""
    return _PACKED and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _bias(conv: nn.Conv2d) -> Tensor:
    return conv.bias.detach() if conv.bias is not None else conv.weight.new_zeros(conv.out_channels)


class PackedConv(nn.Module):
    """A trained Conv2d in `dtype`."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = conv.weight.detach().to(dtype, memory_format=torch.channels_last)
        self.bias = _bias(conv).to(dtype)
        self.padding, self.stride = [*map(int, conv.padding)], [*conv.stride]
        self.packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[2:] == (1, 1) and self.weight.shape[1] <= 256:  # longer sums round by the number of rows
            return F.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)
        if not _packable(x):
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        window = (self.padding, self.stride, [1, 1], 1)
        if self.packed is None:  # the layout depends on the sides of the image, not on the number of images
            self.packed = _REORDER(self.weight.contiguous().to_mkldnn(), *window, list(x.shape))
        out: Tensor = _OPERATORS._convolution_pointwise(x, self.packed, self.bias, *window, "none", [], "")
        return out


class UpsampledConv(nn.Module):
    """A trained 3x3 Conv2d of an image with doubled sides, from the image itself.

    To repeat pixels and to convolve are both linear: together, a transposed convolution of stride 2 whose 4x4 weights
    are sums of the 3x3 ones. It takes 16 products where the two take 36.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        sums = F.avg_pool2d(conv.weight.detach().double(), 2, stride=1, padding=1) * 4  # (outputs, inputs, 4, 4)
        self.weight = sums.flip(2, 3).transpose(0, 1).to(dtype, memory_format=torch.channels_last)
        self.bias = _bias(conv).to(dtype)
        self.packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not _packable(x):
            return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)
        window = ([1, 1], [0, 0], [2, 2], [1, 1], 1)  # padding, output padding, stride, dilation, groups
        if self.packed is None:
            reorder = _OPERATORS._reorder_convolution_transpose_weight
            self.packed = reorder(self.weight.contiguous(), *window, list(x.shape))
        out: Tensor = _OPERATORS._convolution_transpose_pointwise(x, self.packed, self.bias, *window, "none", [], "")
        return out


class SiLUConv(nn.Module):
    """conv(silu(x)) + plus, for a trained 3x3 Conv2d that keeps the sides; x is overwritten."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.direct = PackedConv(conv, dtype)
        self.transformed: dict[int, Tensor] = {}  # weights, by the side of a tile

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        tile = _winograd_tile(x, self.direct.weight)
        if tile is None:
            out: Tensor = self.direct(F.silu(x, inplace=True))
            return out if plus is None else out.add_(plus)
        if tile not in self.transformed:
            self.transformed[tile] = _transformed(self.direct.weight, tile)
        bias = self.direct.bias[:, None, None]
        return _winograd(x, self.transformed[tile], tile, bias if plus is None else plus + bias)


def _winograd_tile(x: Tensor, weight: Tensor) -> int | None:
    """The side of the tiles that Winograd's algorithm computes at once, or None where a direct convolution is faster.

    4x4 outputs take 36 products instead of 144, but weights four times as large, which few rows share on a small map.
    """
    side, narrow, wide = x.shape[-1], *sorted(weight.shape[:2])
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    if narrow < 64 or wide < 128 or side < 8 or side % 2:
        return None
    return 4 if side >= 16 and side % 4 == 0 else 2


def _toom_cook(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """B^T, G and A^T of Winograd's Y = A^T [(G g G^T) * (B^T d B)] A, float64 (Lavin & Gray 2016, eq. 8).

    Polynomials are evaluated at `tile + 1` points and at infinity. The points decide the rounding error (Barabasz
    2020): these of 4x4 give half that of the usual 0, ±1, ±2 and twice that of a direct convolution.
    """
    points = torch.tensor({2: [0, 1, -1], 4: [0, 0.75, -0.75, 1.5, -1.5]}[tile], dtype=torch.float64)

    def evaluate(coefficients: int) -> Tensor:
        at_infinity = torch.eye(coefficients, dtype=torch.float64)[-1:]
        return torch.cat((torch.vander(points, coefficients, increasing=True), at_infinity))

    return torch.linalg.inv(evaluate(tile + 2)).T, evaluate(3), evaluate(tile).T


def _transformed(weight: Tensor, tile: int) -> Tensor:
    """G g G^T of 3x3 weights (outputs, inputs, 3, 3): float32 ((tile + 2)², inputs, outputs)."""
    G = _toom_cook(tile)[1]
    return torch.einsum("ai,bj,kcij->abck", G, G, weight.double()).flatten(0, 1).float().contiguous()


@cache
def _transforms(tile: int) -> tuple[Tensor, Tensor]:
    """d -> B^T d B and m -> A^T m A, as matrices on flattened patches, float32."""
    BT, _, AT = _toom_cook(tile)
    return torch.kron(BT, BT).float(), torch.kron(AT, AT).float()


def _winograd(x: Tensor, weight: Tensor, tile: int, plus: Tensor) -> Tensor:
    """conv(silu(x)) + plus by F(tile x tile, 3x3), a few images at a time so that all between stays in the cache."""
    n, inputs, height, width = x.shape
    outputs, rows, columns, patch = weight.shape[-1], height // tile, width // tile, tile + 2
    to_patch, from_patch = _transforms(tile)

    padded = x.new_empty(n, height + 2, width + 2, inputs)
    for border in (padded[:, 0], padded[:, -1], padded[:, :, 0], padded[:, :, -1]):
        border.zero_()
    torch.ops.aten.silu.out(x.permute(0, 2, 3, 1), out=padded[:, 1:-1, 1:-1])
    patches = padded.unfold(1, patch, tile).unfold(2, patch, tile).permute(0, 1, 2, 4, 5, 3)

    def tiles(image: Tensor) -> Tensor:  # (N, H, W, outputs) as (N, rows, columns, tile, tile, outputs)
        return image.view(n, rows, tile, columns, tile, outputs).transpose(2, 3)

    out = x.new_empty(n, height, width, outputs)
    plus = tiles(plus.expand(n, outputs, height, width).permute(0, 2, 3, 1))
    step = max(1, 128 // (rows * columns))
    for images in (slice(start, start + step) for start in range(0, n, step)):
        d = patches[images].reshape(-1, patch * patch, inputs)
        d = torch.bmm(to_patch.expand(len(d), -1, -1), d)
        m = torch.bmm(d.transpose(0, 1), weight)  # for each position in a patch, one product of (patches, channels)
        y = torch.mm(from_patch, m.flatten(1)).view(tile, tile, -1, rows, columns, outputs)
        torch.add(y.permute(2, 3, 4, 0, 1, 5), plus[images], out=tiles(out)[images])
    return out.permute(0, 3, 1, 2)
