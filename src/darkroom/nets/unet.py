"""The noise-predicting UNet of DDPM (Ho 2020) with the decoder of ADM (Dhariwal & Nichol 2021).

Every level has `num_res_blocks` residual blocks on the way down and one more on the way up, so that each feature map of
the encoder meets exactly one block of the decoder. The time embedding enters every residual block.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TimeConditioning = Literal["additive", "scale_shift"]
# Positions from which attention is laid out for the fused kernels, which need a head's channels side by side. Below,
# plain products are faster.
FUSED_FROM = 64


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of timesteps `t` (N,), integer or real: float32 (N, width) (Ho 2020, app. B)."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    embedding = torch.cat((angles.cos(), angles.sin()), dim=1)
    return F.pad(embedding, (0, width - 2 * half))


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Start a residual branch at zero, so that the network starts as its skip connections."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-conv twice around a skip connection, conditioned on an embedding in between."""

    def __init__(
        self, inputs: int, outputs: int, embedding: int, groups: int, dropout: float, conditioning: TimeConditioning
    ) -> None:
        super().__init__()
        self.scale_shift = conditioning == "scale_shift"
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.embed = nn.Linear(embedding, 2 * outputs if self.scale_shift else outputs)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map x (N, inputs, H, W) and an activated embedding (N, embedding) to (N, outputs, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        condition = self.embed(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + condition)
        out: Tensor = self.skip(x) + self.conv2(self.dropout(F.silu(h)))
        return out


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions, around a skip connection."""

    def __init__(self, channels: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, channels, H, W) to the same shape."""
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (N, positions, 3 c)
        if h * w >= FUSED_FROM:
            qkv = qkv.contiguous()
        qkv = qkv.unflatten(2, (3, self.heads, c // self.heads)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])  # (N, heads, positions, c / heads)
        out: Tensor = self.out(attended.permute(0, 1, 3, 2).reshape(n, c, h, w))
        return x + out


class _Level(nn.Module):
    """One residual block, with attention where the resolution asks for it."""

    def __init__(self, block: ResidualBlock, attention: SelfAttention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention if attention is not None else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.attention(self.block(x, embedding))
        return out


class Upsample(nn.Module):
    """Twice the side length by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class UNet(nn.Module):
    """Predicts the noise eps in x_t from (x_t, t, label).

    `num_classes` real labels; with `null_class` one row more, whose index `num_classes` stands for "no label". Zero
    classes make an unconditional network. `image_size` decides at which levels attention occurs.
    """

    def __init__(
        self,
        *,
        image_size: int,
        image_channels: int,
        num_classes: int,
        null_class: bool,
        channels: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        head_channels: int,
        norm_groups: int,
        dropout: float = 0.0,
        time_conditioning: TimeConditioning = "additive",
    ) -> None:
        super().__init__()
        self.base = channels[0]
        width = 4 * self.base
        self.time_mlp = nn.Sequential(nn.Linear(self.base, width), nn.SiLU(), nn.Linear(width, width))
        self.label_embedding = nn.Embedding(num_classes + null_class, width) if num_classes else None

        def level(inputs: int, outputs: int, resolution: int) -> _Level:
            block = ResidualBlock(inputs, outputs, width, norm_groups, dropout, time_conditioning)
            attend = resolution in attention_resolutions
            return _Level(block, SelfAttention(outputs, head_channels, norm_groups) if attend else None)

        self.stem = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        skips, current, resolution = [channels[0]], channels[0], image_size
        for depth, outputs in enumerate(channels):
            if depth > 0:
                self.down.append(nn.Conv2d(current, current, 3, stride=2, padding=1))
                skips.append(current)
                resolution //= 2
            for _ in range(num_res_blocks):
                self.down.append(level(current, outputs, resolution))
                current = outputs
                skips.append(current)

        self.middle_in = ResidualBlock(current, current, width, norm_groups, dropout, time_conditioning)
        self.middle_attention = SelfAttention(current, head_channels, norm_groups)
        self.middle_out = ResidualBlock(current, current, width, norm_groups, dropout, time_conditioning)

        self.up = nn.ModuleList()
        for depth, outputs in reversed(list(enumerate(channels))):
            for _ in range(num_res_blocks + 1):
                self.up.append(level(current + skips.pop(), outputs, resolution))
                current = outputs
            if depth > 0:
                self.up.append(Upsample(current))
                resolution *= 2
        self.norm_out = nn.GroupNorm(norm_groups, current)
        self.conv_out = _zero(nn.Conv2d(current, image_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict eps, float32 of x's shape, from x_t (N, C, H, W), timesteps t (N,) and labels int64 (N,)."""
        return self.denoise(x, self.embed(t, labels))

    def embed(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The activated embedding (N, 4 * channels[0]) of timesteps and labels that every residual block receives."""
        embedding: Tensor = self.time_mlp(timestep_embedding(t, self.base))
        if self.label_embedding is not None:
            if labels is None:
                raise ValueError("a class-conditional network needs labels; the null class stands for none")
            embedding = embedding + self.label_embedding(labels)
        return F.silu(embedding)

    def denoise(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Predict eps, float32 of x's shape, from x_t and what `embed` gave."""
        h = self.stem(x)
        skips = [h]
        for module in self.down:
            h = module(h, embedding) if isinstance(module, _Level) else module(h)
            skips.append(h)
        h = self.middle_out(self.middle_attention(self.middle_in(h, embedding)), embedding)
        for module in self.up:
            h = module(torch.cat((h, skips.pop()), dim=1), embedding) if isinstance(module, _Level) else module(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out.float()
