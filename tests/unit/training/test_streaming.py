import errno
import gc
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from darkroom.data.dataset import Split
from darkroom.errors import InputError, StageFailed
from darkroom.training import streaming
from darkroom.training.batches import DataOrder, ResidentImages
from darkroom.training.setup import set_up
from darkroom.training.streaming import AHEAD, StreamedImages, open_images
from tests.unit.training.small import INFO, PARAMS, small_training

CPU = torch.device("cpu")
COUNT = 37
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 4, 4), dtype=np.uint8)
LABELS = np.arange(COUNT) % 10


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    return np.load(tmp_path / "images.npy", mmap_mode="r")


@pytest.fixture
def open_stream():
    """`open_stream(images)`, closed after the test."""
    opened = []

    def open_(images, device=CPU):
        opened.append(StreamedImages(images, LABELS, DataOrder(5, COUNT), device))
        return opened[-1]

    yield open_
    for stream in opened:
        stream.close()


def resident(device=CPU):
    return ResidentImages(torch.tensor(IMAGES, device=device), torch.tensor(LABELS, device=device), DataOrder(5, COUNT))


def assert_same(stream, slices, device=CPU):
    """`stream` gives what resident images give."""
    expected = resident(device)
    for first, size in slices:
        for ours, theirs in zip(stream(first, size), expected(first, size), strict=True):
            assert ours.device.type == device.type
            assert torch.equal(ours, theirs), (first, size)


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("darkroom-images")]


ONE_RANK = [(first, 8) for first in range(0, 160, 8)]
SECOND_OF_TWO = [(first + 4, 4) for first in range(0, 160, 8)]
RANKS_DIVIDE_MICRO_BATCHES = [(first + 2, 2) for first in range(0, 160, 4)]
MICRO_BATCHES_OF_A_RANK = [(step + 8 + part, 2) for step in range(0, 96, 16) for part in range(0, 8, 2)]
ANY = [(70, 3), (0, 37), (0, 37), (5, 1), (1000, 100), (1100, 1), (0, 1)]


@pytest.mark.parametrize(
    "slices", [ONE_RANK, SECOND_OF_TWO, RANKS_DIVIDE_MICRO_BATCHES, MICRO_BATCHES_OF_A_RANK, ANY, ONE_RANK[::-1]]
)
@pytest.mark.parametrize("where", ["file", "array", "part of a file"])
def test_streamed_batches_are_the_resident_ones(open_stream, tmp_path, mapped, slices, where):
    if where == "part of a file":
        np.save(tmp_path / "more.npy", np.concatenate((IMAGES[:2], IMAGES, IMAGES[:1])))
        mapped = np.load(tmp_path / "more.npy", mmap_mode="r")[2:-1]
    assert_same(open_stream(IMAGES if where == "array" else mapped), slices)


@pytest.mark.parametrize("slices", [ONE_RANK, SECOND_OF_TWO, RANKS_DIVIDE_MICRO_BATCHES])
def test_what_comes_next_has_been_read_before_it_is_asked_for(open_stream, mapped, monkeypatch, slices):
    stream = open_stream(mapped)
    for first, size in slices[:4]:  # by then it knows how far apart they are
        stream(first, size)
    stream._thread.submit(lambda: None).result()  # it has read all that it was going to
    read, asked = stream._read, []
    monkeypatch.setattr(stream, "_read", lambda first, size: asked.append((first, size)) or read(first, size))
    assert_same(stream, slices[4 : 4 + AHEAD])
    stream._thread.submit(lambda: None).result()
    assert asked == slices[4 + AHEAD : 4 + 2 * AHEAD]


def test_reading_goes_on_while_training_computes(open_stream):
    stream = open_stream(IMAGES)
    read = stream._images.read
    stream._images.read = lambda *arguments: time.sleep(0.05) or read(*arguments)
    stream(0, 4)
    time.sleep(0.05 * (AHEAD + 1))  # a step
    started = time.monotonic()
    for first in range(4, 4 + 4 * AHEAD, 4):
        stream(first, 4)
    assert time.monotonic() - started < 0.05


def test_a_file_that_was_cut_short_is_one_error_when_the_training_gets_there(open_stream, mapped, tmp_path):
    stream = open_stream(mapped)
    os.truncate(tmp_path / "images.npy", 200)
    with pytest.raises(StageFailed, match=r"images\.npy: cut short at image \d+; run the prepare stage again"):
        assert_same(stream, ONE_RANK)


def test_a_disk_that_fails_is_one_error_and_not_the_end_of_the_process(open_stream, mapped, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    stream = open_stream(mapped)
    assert_same(stream, [(0, 8)])
    stream._thread.submit(lambda: None).result()
    monkeypatch.setattr(os, "preadv", failing)
    assert_same(stream, [(8, 8)])  # read before that
    with pytest.raises(StageFailed, match=r"images\.npy: cannot be read any more \(Input/output error\)"):
        assert_same(stream, ONE_RANK[2:])


def test_an_error_that_nobody_meets_is_no_error(open_stream, mapped, monkeypatch):
    stream = open_stream(mapped)
    monkeypatch.setattr(stream._images, "read", lambda *_: None)
    assert len(stream(0, 8)[1]) == 8
    monkeypatch.setattr(stream, "_read", lambda *_: 1 / 0)
    stream(8, 8)
    stream.close()


def test_the_thread_ends_with_the_training_and_with_the_images(mapped):
    before = len(readers())
    stream = StreamedImages(mapped, LABELS, DataOrder(5, COUNT), CPU)
    stream(0, 8)
    assert len(readers()) == before + 1
    stream.close()
    assert len(readers()) == before
    forgotten = StreamedImages(IMAGES, LABELS, DataOrder(5, COUNT), CPU)
    forgotten(0, 8)
    del forgotten
    gc.collect()
    for thread in readers()[before:]:
        thread.join(10)
    assert len(readers()) == before


def test_a_streamed_training_ends_bitwise_equal(tmp_path, monkeypatch):
    trained = {}
    for choice in ("device", "stream"):
        monkeypatch.setenv("DARKROOM_DATA", choice)
        trained[choice] = small_training(tmp_path / choice, horizontal_flip=True).ema.state_dict()
    for name, tensor in trained["device"].items():
        assert torch.equal(tensor, trained["stream"][name]), name


@pytest.mark.parametrize(
    ("free", "choice", "kind"),
    [
        (2 * IMAGES.nbytes, None, ResidentImages),
        (2 * IMAGES.nbytes - 1, None, StreamedImages),
        (0, "device", ResidentImages),
        (1 << 60, "stream", StreamedImages),
        (1 << 60, "", ResidentImages),
    ],
)
def test_free_memory_decides_unless_told(monkeypatch, free, choice, kind):
    monkeypatch.setattr(streaming, "free_memory", lambda device: free)
    if choice is not None:
        monkeypatch.setenv("DARKROOM_DATA", choice)
    opened = open_images(Split(IMAGES, LABELS), DataOrder(5, COUNT), CPU)
    assert isinstance(opened, kind)
    opened.close()


def test_streaming_without_being_told_to_is_announced_with_the_sizes(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(streaming, "free_memory", lambda device: 1000)
    open_images(Split(IMAGES, LABELS), DataOrder(5, COUNT), CPU).close()
    assert "streaming the images: they take 0.0 GB, and 0.0 GB are free on cpu" in caplog.text


def test_another_choice_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("DARKROOM_DATA", "gpu")
    with pytest.raises(InputError, match=r"^DARKROOM_DATA = 'gpu': expected device or stream"):
        set_up(PARAMS, INFO, Split(IMAGES[:, :1], LABELS), CPU)


def test_images_that_do_not_fit_after_all_are_one_clear_line(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setenv("DARKROOM_DATA", "device")
    monkeypatch.setattr(torch, "tensor", full)
    with pytest.raises(StageFailed, match=r"^the images \(0\.0 GB\) do not fit on cpu; DARKROOM_DATA=stream reads"):
        open_images(Split(IMAGES, LABELS), DataOrder(5, COUNT), CPU)


def test_free_memory_is_what_the_machine_and_the_container_leave():
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    assert 1 << 20 < streaming.free_memory(CPU) <= 1024 * total


@pytest.mark.gpu
def test_streamed_batches_are_the_resident_ones_on_a_gpu(open_stream, mapped, gpu, never_waiting):
    stream = open_stream(mapped, gpu)
    assert_same(stream, ONE_RANK, gpu)
    with never_waiting():
        stream(160, 8)
