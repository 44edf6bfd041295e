"""The packed data set: what it holds, that it is repeatable, and that it is never half there."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from darkroom.data import packing
from darkroom.data.chunks import Chunk, make_chunk
from darkroom.data.dataset import DatasetInfo, load_info, load_split
from darkroom.data.images import decode
from darkroom.data.packing import locked, pack
from darkroom.data.sources import open_source
from darkroom.data.statistics import read_statistics
from darkroom.data.workers import in_processes
from darkroom.errors import InputError, StageFailed
from darkroom.files import digest_file, replacing_directory
from darkroom.params import DataParams
from tests.ranks import running

Make = Callable[..., DataParams]
FILES = {
    "dataset.json",
    "manifest.parquet",
    "train_images.npy",
    "train_labels.npy",
    "test_images.npy",
    "test_labels.npy",
    "statistics.json",
}


def prepare(root: Path, params: DataParams, name: str = "prepared") -> tuple[DatasetInfo, Path]:
    prepared, scratch = root / name, root / "scratch"
    return pack(open_source(params, root, root / "raw", scratch), params, prepared, scratch), prepared


def contents(directory: Path) -> dict[str, str]:
    return {path.name: digest_file(path) for path in directory.iterdir()}


def test_packed_arrays_are_the_decoded_images_in_the_manifests_order(folder: Path, data_params: Make) -> None:
    info, prepared = prepare(folder.parent, data_params())
    assert {path.name for path in prepared.iterdir()} == FILES
    assert load_info(prepared) == info
    assert info.splits == {"train": 22, "test": 8}  # 2 of 8, 3 (2.5 rounded up) of 10, 3 of 12
    rows = pq.read_table(prepared / "manifest.parquet").to_pylist()
    assert [row["path"] for row in rows] == sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
    for split in ("train", "test"):
        packed = load_split(prepared, split)
        own = [i for i, row in enumerate(rows) if row["split"] == split]
        assert packed.labels.tolist() == [rows[i]["label"] for i in own]
        assert isinstance(packed.images, np.memmap)
        assert packed.images.dtype == np.uint8
        for position, i in enumerate(own):
            expected = decode((folder / rows[i]["path"]).read_bytes(), 8, 1).pixels
            np.testing.assert_array_equal(packed.images[position], expected)
            assert rows[i]["mean"] == pytest.approx(packed.images[position].mean())
            assert rows[i]["std"] == pytest.approx(packed.images[position].std())
            assert rows[i]["sha256"] == digest_file(folder / rows[i]["path"])
            assert rows[i]["packed"] == "1x8x8"


def test_same_images_give_the_same_bytes(folder: Path, data_params: Make) -> None:
    first, one = prepare(folder.parent, data_params(), "one")
    for path in folder.rglob("*.png"):
        os.utime(path, (0, 0))
    second, two = prepare(folder.parent, data_params(), "two")
    assert first == second
    assert contents(one) == contents(two)


def test_digest_follows_pixels_labels_and_class_names(folder: Path, data_params: Make) -> None:
    before = prepare(folder.parent, data_params(), "a")[0].digest
    assert prepare(folder.parent, data_params(seed=1), "b")[0].digest != before
    (folder / "ant").rename(folder / "ape")
    assert prepare(folder.parent, data_params(), "c")[0].digest != before
    (folder / "ape").rename(folder / "ant")
    assert prepare(folder.parent, data_params(), "d")[0].digest == before
    Image.new("L", (16, 16), 3).save(folder / "ant" / "00.png")
    assert prepare(folder.parent, data_params(), "e")[0].digest != before


def test_bad_image_is_in_the_manifest_and_not_in_the_arrays(folder: Path, data_params: Make) -> None:
    (folder / "bee" / "03.png").write_bytes(b"no image")
    info, prepared = prepare(folder.parent, data_params())
    assert sum(info.splits.values()) == 29
    bad = [row for row in pq.read_table(prepared / "manifest.parquet").to_pylist() if not row["decoded"]]
    assert [(row["path"], row["split"], row["bytes"]) for row in bad] == [("bee/03.png", "none", 8)]
    assert "not a PNG" in bad[0]["error"]
    assert bad[0]["width"] is None
    assert bad[0]["mean"] is None


def test_class_of_bad_images_alone_is_refused_with_the_first_reason(folder: Path, data_params: Make) -> None:
    for path in (folder / "cow").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"class cow: none of its 12 images .* cow/00.png: the file is empty"):
        prepare(folder.parent, data_params())


def test_statistics_count_every_decoded_image(folder: Path, data_params: Make) -> None:
    (folder / "bee" / "03.png").write_bytes(b"no image")
    info, prepared = prepare(folder.parent, data_params())
    found = read_statistics(prepared)
    pixels = np.concatenate([load_split(prepared, split).images for split in ("train", "test")])
    assert found.digest == info.digest
    assert found.classes == {"ant": 8, "bee": 9, "cow": 12}
    assert (found.sums, found.squares) == ([int(pixels.sum())], [int((pixels.astype(int) ** 2).sum())])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four images, so that 30 make 8, all in this process."""
    monkeypatch.setattr(packing, "CHUNK_BYTES", 4 * 64)
    monkeypatch.setattr(packing, "_CHUNK_IMAGES", (1, 4096))
    monkeypatch.setattr(packing, "worker_count", lambda: 1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_chunks_and_processes_change_no_byte(
    folder: Path, data_params: Make, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "bee" / "03.png").write_bytes(b"no image")
    with monkeypatch.context() as whole:
        whole.setattr(packing, "CHUNK_BYTES", 1 << 20)
        _, expected = prepare(folder.parent, data_params(), "whole")
    monkeypatch.setattr(packing, "worker_count", lambda: workers)
    _, found = prepare(folder.parent, data_params(), "chunks")
    assert contents(found) == contents(expected)
    assert list((folder.parent / "scratch").iterdir()) == []


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there_and_the_next_run_makes_only_what_is_missing(
    folder: Path, data_params: Make, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, prepared = prepare(folder.parent, data_params())
    before, made = contents(prepared), []

    def make(chunk: Chunk, part: object, count: int) -> int:
        if chunk.number == 5 and not broken:
            broken.append(True)
            raise error
        made.append(chunk.number)
        return make_chunk(chunk, part, count)  # type: ignore[arg-type]

    broken: list[bool] = []
    monkeypatch.setattr(packing, "make_chunk", make)
    (folder / "ant" / "00.png").touch()
    with pytest.raises(type(error)):
        prepare(folder.parent, data_params())
    assert contents(prepared) == before
    broken.clear()
    with pytest.raises(type(error)):
        prepare(folder.parent, data_params(), "fresh")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["animals", "prepared", "scratch"]
    prepare(folder.parent, data_params())
    assert made == list(range(8))  # none twice, over all three runs
    assert contents(prepared) == before


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("change", ["image", "size", "code"])
def test_chunks_of_something_else_are_not_used(
    folder: Path, data_params: Make, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as stopping:
        stopping.setattr(packing, "_assemble", stop)
        with pytest.raises(RuntimeError):
            prepare(folder.parent, data_params())
    assert len(list((folder.parent / "scratch").glob("chunks-*/*.parquet"))) == 8
    params = data_params(image_size=16) if change == "size" else data_params()
    if change == "image":
        Image.new("L", (16, 16), 3).save(folder / "ant" / "00.png")
    elif change == "code":
        monkeypatch.setattr(packing, "_CODE", [])
    _, found = prepare(folder.parent, params, "found")
    _, expected = prepare(folder.parent, params, "expected")
    assert contents(found) == contents(expected)


def test_a_second_one_at_the_same_time_is_refused(folder: Path, data_params: Make) -> None:
    with locked(folder.parent / "scratch"), pytest.raises(StageFailed, match="another process is preparing data"):
        prepare(folder.parent, data_params())


def test_a_disk_that_is_too_small_is_said_before_the_work(
    folder: Path, data_params: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(StageFailed, match=r"0\.0 GB free; packing 30 images needs"):
        prepare(folder.parent, data_params())


def test_a_worker_that_is_killed_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="a process that decodes images was killed"):
        list(in_processes(signal.raise_signal, [(signal.SIGKILL,)] * 2, 2))


def test_no_worker_survives_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys, time\n"
        "from darkroom.data.workers import in_processes\n"
        "if __name__ == '__main__':\n"
        "    list(in_processes(os.system, [('echo $PPID >> pids; sleep 60',)] * 2, 2))\n"
    )
    (tmp_path / "script.py").write_text(script)
    parent = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    workers = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    while any(running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_sources_own_split_is_kept(folder: Path, data_params: Make) -> None:
    root = folder.parent / "splits"
    for name in ("ant", "bee", "cow"):
        (root / "test" / name).mkdir(parents=True)
        (folder / name / "07.png").rename(root / "test" / name / "07.png")
    folder.rename(root / "train")
    info, prepared = prepare(folder.parent, data_params(source="splits", test_fraction=None))
    assert info.splits == {"train": 27, "test": 3}
    rows = pq.read_table(prepared / "manifest.parquet").to_pylist()
    assert all(row["path"].startswith(row["split"]) for row in rows)


def test_class_that_only_the_test_split_has_is_refused(folder: Path, data_params: Make) -> None:
    root = folder.parent / "splits"
    (root / "test").mkdir(parents=True)
    (folder / "cow").rename(root / "test" / "cow")
    folder.rename(root / "train")
    with pytest.raises(InputError, match="class cow: none of its images is in the source's own train split"):
        prepare(folder.parent, data_params(source="splits", test_fraction=None))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_no_half_written_output(tmp_path: Path, number: signal.Signals) -> None:
    script = (
        "import signal, sys, time; from pathlib import Path; from darkroom.files import replacing_directory\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "with replacing_directory(Path('out')) as directory:\n"
        "    (directory / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    with replacing_directory(tmp_path / "out"):  # a second one beside it does not take the first's away
        assert len(list(tmp_path.glob(".out.*/new/half"))) == 1
        time.sleep(0)
    process.send_signal(number)
    process.wait(timeout=10)
    process.stdout.close()
    assert not (tmp_path / "out" / "half").exists()
    with replacing_directory(tmp_path / "out") as directory:
        (directory / "whole").write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/whole"]
