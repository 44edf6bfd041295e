"""A copy of the training state in host memory, laid out as the safetensors file that it becomes."""

import hashlib
import json
import math
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 1 << 20  # bytes that are written and hashed at a time
_ELEMENTS = 1 << 14  # checked at a time: fewer than torch splits among threads, which belong to the training


class HostCopy:
    """One block of memory, allocated at the first copy and used again by every later one of the same shapes.

    It is pinned when tensors come from a GPU. The file is written from it here rather than by `safetensors.save_file`,
    so that it is hashed in the same pass and a full disk is the OSError that the system reported.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}  # views of the block
        self._layout: object = None
        self._block = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors of any device and memory format; afterwards they may change. Waits for the GPU once."""
        gpus = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        # The format knows no gaps: with the widest types first, each tensor begins at a multiple of its element.
        order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        layout = [(name, tensors[name].dtype, tensors[name].shape) for name in order], bool(gpus)
        if layout != self._layout:
            self._allocate({name: tensors[name] for name in order}, pinned=bool(gpus))
            self._layout = layout
        for name, view in self.tensors.items():
            view.copy_(tensors[name].detach(), non_blocking=True)
        for gpu in gpus:
            torch.cuda.current_stream(gpu).synchronize()

    def _allocate(self, tensors: dict[str, Tensor], *, pinned: bool) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        self.tensors, self._block = {}, torch.empty(0, dtype=torch.uint8)  # the block before is free first
        self._block = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        begin = 0
        for name, tensor in tensors.items():
            end = begin + tensor.nbytes
            self.tensors[name] = self._block[begin:end].view(tensor.dtype).view(tensor.shape)
            begin = end

    def not_finite(self) -> str | None:
        """The name of a tensor that holds a NaN or an infinity, if there is one."""
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point():
                for chunk in torch.split(tensor.flatten(), _ELEMENTS):
                    if chunk.numel() and not all(math.isfinite(extreme) for extreme in chunk.aminmax()):
                        return name
        return None

    def write(self, path: Path) -> tuple[int, str]:
        """Write the copy as a safetensors file; returns its size in bytes and its sha256. Does not sync it."""
        header, begin = {}, 0
        for name, tensor in self.tensors.items():
            end = begin + tensor.nbytes
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        hasher = hashlib.sha256()
        with path.open("wb") as file:
            for content in (memoryview(len(text).to_bytes(8, "little") + text), self._block.numpy().data):
                for start in range(0, len(content), _CHUNK):
                    file.write(content[start : start + _CHUNK])
                    hasher.update(content[start : start + _CHUNK])
            return file.tell(), hasher.hexdigest()
