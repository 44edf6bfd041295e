"""Where the training images are kept: on the device if they fit, else in their file, from which a thread reads ahead.

Both give the same batches, so this is a matter of the machine: `DARKROOM_DATA=device` or `stream` overrides what the
free memory suggests.
"""

import logging
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darkroom.data.dataset import Split
from darkroom.errors import InputError, StageFailed
from darkroom.training.batches import DataOrder, Images, ResidentImages, without_waiting

AHEAD = 3  # batches: enough to sit out a slow read, little beside what a training step takes
SHARE = 0.5  # of the free memory that the images may take; the rest is for the network and its activations
_log = logging.getLogger(__name__)


def open_images(data: Split, order: DataOrder, device: torch.device) -> Images:
    """The images of `data` for training on `device`: resident if `DARKROOM_DATA` or the free memory says so.

    Raises InputError for another value of DARKROOM_DATA, StageFailed when the images are to be resident and are too
    large.
    """
    choice = os.environ.get("DARKROOM_DATA") or None
    if choice not in (None, "device", "stream"):
        raise InputError(f"DARKROOM_DATA = {choice!r}: expected device or stream, or nothing to decide by free memory")
    if choice is None:
        free = free_memory(device)
        choice = "device" if data.images.nbytes <= SHARE * free else "stream"
        if choice == "stream":
            _log.info(
                "streaming the images: they take %.1f GB, and %.1f GB are free on %s",
                data.images.nbytes / 1e9,
                free / 1e9,
                device,
            )
    if choice == "stream":
        return StreamedImages(data.images, data.labels, order, device)
    try:
        return ResidentImages(torch.tensor(data.images, device=device), torch.tensor(data.labels, device=device), order)
    except torch.OutOfMemoryError:
        size = f"{data.images.nbytes / 1e9:.1f} GB"
        raise StageFailed(
            f"the images ({size}) do not fit on {device}; DARKROOM_DATA=stream reads them from disk"
        ) from None


class StreamedImages:
    """Reads batches from the file of the images, the expected next ones ahead of time in a thread of its own.

    Expected is a `first` that grows by the same amount from call to call, as it does for every rank and for every
    micro-batch if ranks divide micro-batches. Any other slice is read when it is asked for.
    """

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], order: DataOrder, device: torch.device
    ) -> None:
        """`images` (N, C, H, W), memory-mapped as a rule; `labels` (N,)."""
        self.device = device
        self._labels, self._order = torch.tensor(labels), order
        self._images = _File(images) if _is_whole_file(images) else _Array(images)
        self._shape = images.shape[1:]
        self._last: tuple[int, int] | None = None
        self._step: int | None = None
        self._ahead: deque[tuple[tuple[int, int], Future[tuple[Tensor, Tensor]]]] = deque()
        self._thread = ThreadPoolExecutor(1, "darkroom-images", _use_gpu, (device,))

    def __call__(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        if not self._ahead or self._ahead[0][0] != (first, size):
            self._forget()
            self._request(first, size)
        images, labels = self._ahead.popleft()[1].result()
        step = size if self._last is None else first - self._last[0]
        if step != self._step:
            self._forget()
        self._last, self._step = (first, size), step
        for count in range(len(self._ahead) + 1, AHEAD + 1):
            if first + count * step >= 0:
                self._request(first + count * step, size)
        return without_waiting(images, self.device), without_waiting(labels, self.device)

    def close(self) -> None:
        self._forget()
        self._thread.shutdown()
        self._images.close()

    def _request(self, first: int, size: int) -> None:
        self._ahead.append(((first, size), self._thread.submit(self._read, first, size)))

    def _forget(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _read(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """Runs in the thread, one at a time. What it raises is raised where the batch is asked for, if it ever is."""
        chosen = self._order(torch.arange(first, first + size))
        images = torch.empty((size, *self._shape), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self._images.read(chosen.numpy(), images.numpy())
        return images, self._labels[chosen]


def _use_gpu(device: torch.device) -> None:
    """In a new thread the current GPU is the first one, where pinning memory would open a context of its own."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


class _Array:
    """Images in memory, or a part of a memory map."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._images = images

    def read(self, chosen: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        np.take(self._images, chosen, axis=0, out=out, mode="clip")  # the default mode would copy once more

    def close(self) -> None:
        """There is nothing to close."""


class _File:
    """A memory map, read as the file that it is: where a disk fails a read raises, and a map kills the process."""

    def __init__(self, images: "np.memmap[Any, Any]") -> None:
        self._path, self._offset = Path(str(images.filename)), int(images.offset)
        self._length = images.nbytes // len(images)  # of one image, in bytes
        self._file = self._path.open("rb", buffering=0)

    def read(self, chosen: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        rows = out.reshape(len(chosen), self._length)
        try:
            for number, row in zip(chosen.tolist(), rows, strict=True):
                if os.preadv(self._file.fileno(), [row.data], self._offset + number * self._length) != self._length:
                    raise StageFailed(f"{self._path}: cut short at image {number}; run the prepare stage again")
        except OSError as error:
            raise StageFailed(f"{self._path}: cannot be read any more ({error.strerror})") from None

    def close(self) -> None:
        self._file.close()


def _is_whole_file(images: NDArray[np.uint8]) -> TypeGuard["np.memmap[Any, Any]"]:
    """Whether the array is all that follows the header of its file, and not a part of that."""
    if not isinstance(images, np.memmap) or images.filename is None or not images.flags.c_contiguous:
        return False
    return Path(images.filename).stat().st_size == images.offset + images.nbytes


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take on `device`: of the GPU, or of the machine and the container around it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts what the file cache would give back
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and used.exists() and (allowed := limit.read_text().strip()) != "max":
        free = min(free, int(allowed) - int(used.read_text()))
    return free
