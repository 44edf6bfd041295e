"""A trained UNet made ready for drawing: the same function, evaluated as fast as the device allows.

What depends on (t, label) only leaves the loop: the embeddings and every block's projection of them become rows of a
table. Weights are cast and put into the device's form once. Activations and sums write where they read.

An image comes out bit for bit the same alone and in any batch on a device, although the kernels that libraries choose
for different numbers of rows round differently: `InferenceUNet` uses only numbers of rows that it saw to agree.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.arithmetic import precision_on
from darkroom.nets.convolution import PackedConv, SiLUConv, UpsampledConv
from darkroom.nets.unet import ResidualBlock, SelfAttention, UNet, Upsample

_LABELS_AT_ONCE = 16
_TABLE_BYTES = 2**28  # what a plan keeps of its table
_NO_LABELS = "a class-conditional network needs labels; the null class stands for none"


class InferenceUNet:
    """`unet` with the weights it has now, on the device where it is, for drawing: no gradients, no dropout.

    `precision` "bf16" rounds weights to bf16 and computes in bf16 where that is faster (`precision_on`), else in fp32.
    `compile` hands the network to torch.compile, which takes a minute or so for each number of rows in use.

    Takes up to five times the memory of the weights on a processor. On a GPU, for one thread at a time.
    """

    @torch.inference_mode()
    def __init__(self, unet: UNet, precision: Literal["fp32", "bf16"] = "fp32", compile: bool = False) -> None:  # noqa: A002
        network = copy.deepcopy(unet).eval()
        self._device = next(network.parameters()).device
        self._dtype = torch.bfloat16 if precision_on(self._device, precision) == "bf16" else torch.float32
        if precision == "bf16":
            for conv in (module for module in network.modules() if isinstance(module, nn.Conv2d)):
                conv.weight.copy_(conv.weight.bfloat16())
        self._embed = network.embed
        self._num_labels = network.label_embedding.num_embeddings if network.label_embedding is not None else 0
        self._project = _make_ready(network, self._dtype)
        self._denoise: Callable[[Tensor, Tensor], Tensor] = network.denoise
        if compile:
            self._denoise = torch.compile(self._denoise, dynamic=False)
        if self._device.type == "cuda":
            self._denoise = _Graphs(self._denoise)
        self._few_sizes = compile or self._device.type == "cuda"  # each is compiled or captured
        self._references: dict[torch.Size, Tensor] = {}
        self._alike: dict[tuple[int, torch.Size], bool] = {}

    @torch.inference_mode()
    def plan(self, timesteps: Sequence[int], labels: Tensor | None = None) -> Callable[..., Tensor]:
        """The network for these timesteps and for `labels` int64 (L,): all that may be asked, the null class included.

        Returns a function of x_t float32 (R, C, H, W), one of `timesteps` as an int, and labels int64 (R,), that gives
        eps, float32 of x_t's shape. An unconditional network ignores labels; a conditional one raises ValueError where
        there are none or where one is not of the network.
        """
        asked = self._checked(labels)
        # How a matrix product rounds depends on its shape. So labels come in fixed groups, whoever asks for them.
        every = torch.arange(max(1, self._num_labels), device=self._device)
        starts = (torch.unique(asked // _LABELS_AT_ONCE) * _LABELS_AT_ONCE).tolist()
        groups = [every[start : start + _LABELS_AT_ONCE] for start in starts]
        planned = torch.cat(groups)
        row = torch.full_like(every, len(planned))  # beyond the table
        row[planned] = torch.arange(len(planned), device=self._device)

        row_bytes = self._project.out_features * self._dtype.itemsize
        kept = max(2, _TABLE_BYTES // (len(planned) * row_bytes))

        @lru_cache(maxsize=kept)
        def conditions(t: int) -> Tensor:
            embeddings = [self._embed(torch.full_like(group, t), group) for group in groups]
            return torch.cat([self._project(embedding) for embedding in embeddings]).to(self._dtype)

        for t in timesteps[:kept]:
            conditions(t)

        @torch.inference_mode()
        def network(x: Tensor, t: int, labels: Tensor | None = None) -> Tensor:
            if self._num_labels == 0:
                labels = torch.zeros(len(x), dtype=torch.int64, device=self._device)
            elif labels is None:
                raise ValueError(_NO_LABELS)
            return self._evaluate(x, conditions(t)[row[labels]])

        return network

    def _checked(self, labels: Tensor | None) -> Tensor:
        if self._num_labels == 0:
            return torch.zeros(1, dtype=torch.int64)
        if labels is None:
            raise ValueError(_NO_LABELS)
        bad = labels[(labels < 0) | (labels >= self._num_labels)]
        if len(bad):
            raise ValueError(f"label {int(bad[0])}: expected 0 to {self._num_labels - 1}")
        return labels.cpu()

    def _evaluate(self, x: Tensor, conditions: Tensor) -> Tensor:
        """Eps of x (R, C, H, W) under conditions (R, columns), in pieces whose rows all round alike.

        A library chooses kernels and divides work by the number of rows, and then rounds differently. What it chooses
        depends on shapes alone. So a number of rows is used after it was seen to give the rows of the largest piece
        bit for bit (`_rounds_alike`); a piece with another number is filled up.
        """
        x = x.to(self._dtype, memory_format=torch.channels_last)
        most = self._most_rows(x.shape[1:])
        pieces = (slice(start, start + most) for start in range(0, len(x), most))
        return torch.cat([self._evaluate_piece(x[piece], conditions[piece], most) for piece in pieces])

    def _evaluate_piece(self, x: Tensor, conditions: Tensor, most: int) -> Tensor:
        rows = len(x)
        size = 1 << (rows - 1).bit_length() if self._few_sizes else rows
        while size < most and not self._rounds_alike(size, x.shape[1:]):
            size *= 2
        size = min(size, most)
        if size > rows:
            filled = torch.arange(size, device=self._device) % rows
            x, conditions = x[filled].contiguous(memory_format=torch.channels_last), conditions[filled]
        return self._denoise(x, conditions)[:rows]

    def _most_rows(self, shape: torch.Size) -> int:
        """The number of rows in the largest piece of images of this shape (C, H, W)."""
        if shape not in self._references:
            # From about here on a row takes no less time, however many there are.
            size = 128 if self._device.type == "cuda" else min(64, max(1, 2**14 // (shape[-2] * shape[-1])))
            rows = self._probe(size, shape)
            while size > 1 and not torch.equal(rows, rows[:1].expand_as(rows)):
                size //= 2
                rows = self._probe(size, shape)
            self._references[shape] = rows
        return len(self._references[shape])

    def _rounds_alike(self, size: int, shape: torch.Size) -> bool:
        if (size, shape) not in self._alike:
            self._alike[size, shape] = torch.equal(self._probe(size, shape), self._references[shape][:size])
        return self._alike[size, shape]

    def _probe(self, size: int, shape: torch.Size) -> Tensor:
        """Eps of `size` times the same noise (C, H, W) under the same conditions."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, *shape, generator=generator).to(self._device, self._dtype)
        conditions = torch.randn(1, self._project.out_features, generator=generator).to(self._device, self._dtype)
        x = x.repeat(size, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        return self._denoise(x, conditions.repeat(size, 1))


def _make_ready(network: UNet, dtype: torch.dtype) -> nn.Linear:
    """Replace modules of `network` by faster ones that compute in `dtype` from rows of conditions.

    Returns what maps the embedding (N, 4 * channels[0]) to conditions (N, columns): all blocks' projections, side by
    side.
    """
    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    for block in blocks:
        if block.scale_shift:  # the 1 of h (1 + scale) + shift goes into the bias
            block.embed.bias[: block.embed.out_features // 2] += 1
    ends = list(itertools.accumulate(block.embed.out_features for block in blocks))
    project = nn.Linear(blocks[0].embed.in_features, ends[-1], device=blocks[0].embed.weight.device)
    project.weight.copy_(torch.cat([block.embed.weight for block in blocks]))
    project.bias.copy_(torch.cat([block.embed.bias for block in blocks]))

    columns = {block: slice(end - block.embed.out_features, end) for block, end in zip(blocks, ends, strict=True)}

    def replace_children(parent: nn.Module) -> None:
        for name, child in parent.named_children():
            if isinstance(child, ResidualBlock):
                setattr(parent, name, _Block(child, columns[child], dtype))
            elif isinstance(child, SelfAttention):
                setattr(parent, name, _Attention(child, dtype))
            elif isinstance(child, Upsample):
                setattr(parent, name, UpsampledConv(child.conv, dtype))
            elif isinstance(child, nn.Conv2d):
                setattr(parent, name, PackedConv(child, dtype))
            elif isinstance(child, nn.GroupNorm):
                setattr(parent, name, _Norm(child, dtype))
            else:
                replace_children(child)

    replace_children(network)
    return project


class _Block(nn.Module):
    """`ResidualBlock` on its columns of the conditions."""

    def __init__(self, block: ResidualBlock, columns: slice, dtype: torch.dtype) -> None:
        super().__init__()
        self.columns, self.scale_shift = columns, block.scale_shift
        self.norm1, self.norm2 = _Norm(block.norm1, dtype), _Norm(block.norm2, dtype)
        self.conv1, self.conv2 = SiLUConv(block.conv1, dtype), SiLUConv(block.conv2, dtype)
        self.skip = PackedConv(block.skip, dtype) if isinstance(block.skip, nn.Conv2d) else nn.Identity()

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        condition = conditions[:, self.columns, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(self.conv1(self.norm1(x))), scale)
        else:
            h = self.norm2(self.conv1(self.norm1(x), condition))
        out: Tensor = self.conv2(h, self.skip(x))
        return out


class _Norm(nn.Module):
    """`GroupNorm` in `dtype`; its statistics are float32 in any case.

    On large maps torch splits rows x positions among its threads, and an image's sums would depend on its batch.
    """

    def __init__(self, norm: nn.GroupNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or len(x) == 1 or x.shape[-1] * x.shape[-2] < 1024:
            out: Tensor = self.norm(x)
            return out
        return torch.cat([self.norm(x[image : image + 1]) for image in range(len(x))])


class _Attention(nn.Module):
    """`SelfAttention` on channels-last maps, where queries, keys and values are views."""

    def __init__(self, attention: SelfAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.norm = attention.heads, _Norm(attention.norm, dtype)
        self.qkv, self.out = PackedConv(attention.qkv, dtype), PackedConv(attention.out, dtype)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(n, h * w, 3, self.heads, c // self.heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        out: Tensor = self.out(attended.transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2))
        return out.add_(x)


class _Graphs:
    """A function of tensors on a GPU, captured as a CUDA graph for each number of rows."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._function = function
        self._pool = torch.cuda.graph_pool_handle()  # shared: of each replay, only the copy of its output survives
        self._captured: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, conditions: Tensor) -> Tensor:
        if x.shape not in self._captured:
            self._captured[x.shape] = self._capture(x.clone(), conditions.clone())
        graph, x_in, conditions_in, out = self._captured[x.shape]
        x_in.copy_(x)
        conditions_in.copy_(conditions)
        graph.replay()
        return out.clone()

    def _capture(self, x: Tensor, conditions: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up, and torch.compile compiles, outside the capture
            for _ in range(3):
                self._function(x, conditions)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = self._function(x, conditions)
        return graph, x, conditions, out
