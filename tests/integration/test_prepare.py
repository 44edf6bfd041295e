"""prepare as it is run: the same data in any form, and a kill in the middle."""

import io
import json
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import boto3
import numpy as np
import pytest
import yaml
from moto.server import ThreadedMotoServer
from PIL import Image

from darkroom.data.dataset import load_info
from darkroom.files import digest_file
from darkroom.stages import prepare
from darkroom.workspace import Workspace
from tests.archives import hub_features, write_parquet

CLASSES = ("ant", "bee", "cow")


def images(count: int) -> dict[str, bytes]:
    """PNG files by name, `count` in each class, in the order in which a folder is read."""
    generator, found = np.random.default_rng(0), {}
    for name in CLASSES:
        for number in range(count):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(buffer, "PNG")
            found[f"{name}/{number:03d}.png"] = buffer.getvalue()
    return found


def project(root: Path, source: str) -> Path:
    params = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
    params["data"] |= {"source": source, "num_classes": 3, "channels": 3}
    root.mkdir(exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    (root / "dvc.yaml").touch()
    return root


def write_folder(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def as_folder(root: Path, files: dict[str, bytes]) -> str:
    write_folder(root / "animals", files)
    return "animals"


def as_labelled_folder(root: Path, files: dict[str, bytes]) -> str:
    """Files in directories that are no classes, as the EDM family keeps them."""
    labels = {f"{number // 10:05d}/{number:04d}.png": name for number, name in enumerate(files)}
    write_folder(root / "animals", {number: files[name] for number, name in labels.items()})
    pairs = [[number, CLASSES.index(name[:3])] for number, name in labels.items()]
    (root / "animals" / "dataset.json").write_text(json.dumps({"labels": pairs, "classes": CLASSES}))
    return "animals"


def as_zip(root: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(root / "animals.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"images/{name}", content)
        pairs = [[f"images/{name}", CLASSES.index(name[:3])] for name in files]
        archive.writestr("dataset.json", json.dumps({"labels": pairs, "classes": CLASSES}))
    return "animals.zip"


def as_parquet(root: Path, files: dict[str, bytes]) -> str:
    names, features = list(files), hub_features(CLASSES)
    for part, chosen in enumerate((names[:20], names[20:])):
        contents, labels = [files[name] for name in chosen], [CLASSES.index(name[:3]) for name in chosen]
        path = root / "animals" / f"data-{part:05d}-of-00002.parquet"
        write_parquet(path, contents, labels, features, row_group=7)
    return "animals"


FORMS = {"folder": as_folder, "folder with labels": as_labelled_folder, "zip": as_zip, "Parquet": as_parquet}


def prepared(root: Path) -> dict[str, str]:
    prepare.run(Workspace(root))
    info = load_info(root / "data" / "prepared")
    arrays = sorted((root / "data" / "prepared").glob("*.npy"))
    return {"digest": info.digest, **{array.name: digest_file(array) for array in arrays}}


def test_the_same_images_give_the_same_bytes_and_digest_in_any_form(tmp_path, monkeypatch):
    files, found = images(12), {}
    for form, write in FORMS.items():
        root = tmp_path / form
        root.mkdir()
        found[form] = prepared(project(root, write(root, files)))
    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for name, content in files.items():
            client.put_object(Bucket="bucket", Key=f"raw/animals/{name}", Body=content)
        client.upload_file(str(tmp_path / "zip" / "animals.zip"), "bucket", "raw/animals.zip")
        found["S3 prefix"] = prepared(project(tmp_path / "prefix", "s3://bucket/raw/animals"))
        found["S3 object"] = prepared(project(tmp_path / "object", "s3://bucket/raw/animals.zip"))
    finally:
        server.stop()
    assert found == dict.fromkeys(found, found["folder"])
    assert set(found["folder"]) == {
        "digest",
        "train_images.npy",
        "train_labels.npy",
        "test_images.npy",
        "test_labels.npy",
    }


SLOWLY = """
import sys
import darkroom.data.packing as packing
from darkroom.stages.prepare import run
from darkroom.stages.runner import main
if __name__ == "__main__":
    packing.CHUNK_BYTES = 10 * 3 * 8 * 8
    packing._CHUNK_IMAGES = (1, 4096)
    main(run)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_half_way_it_goes_on_from_the_whole_chunks(tmp_path, number):
    root = project(tmp_path / "project", "animals")
    as_folder(root, images(200))
    (root / "slowly.py").write_text(SLOWLY)
    expected = prepared(root)

    command = [sys.executable, "slowly.py"]
    (root / "animals" / "ant" / "000.png").touch()  # nothing of the run before is used
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    chunks = root / ".darkroom" / "prepare"
    deadline = time.monotonic() + 60
    while len(list(chunks.glob("chunks-*/*.parquet"))) < 20:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    if number == signal.SIGTERM:
        assert (process.returncode, b"interrupted" in output) == (130, True)
    kept = {path.name: path.stat().st_mtime_ns for path in chunks.glob("chunks-*/*.parquet")}
    assert 20 <= len(kept) < 60, "killed in the middle"
    assert not list((root / "data").glob(".prepared*"))

    again = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    went_on = re.search(r"preparing: (\d+)/600 images +made before an interruption", again)
    assert went_on is not None
    assert int(went_on[1]) == 10 * len(kept)
    assert prepared(root) == expected
