"""The project as one file: what is in it, that it is the same everywhere, and that no name in it is trusted."""

import io
import stat
import zipfile
from pathlib import Path

import pytest

from darkroom.errors import StageFailed
from darkroom.files import write_text
from darkroom.registry.snapshot import collect, pack, pack_project, unpack

LOCK = """
schema: '2.0'
stages:
  one:
    deps:
    - path: data/raw
    - path: src/darkroom/a.py
    - path: tools
    - path: config.toml
    - path: s3://bucket/far
    - path: ../outside
    outs:
    - path: data/prepared
  two:
    deps:
    - path: data/prepared/part
"""


def make(root: Path) -> Path:
    for name in (
        "dvc.yaml",
        "params.yaml",
        "src/darkroom/a.py",
        "src/darkroom/__pycache__/a.pyc",
        "src/other/b.py",
        "expectations/images.json",
        "tools/deep/t.sh",
        "config.toml",
        "data/raw/.gitkeep",
        "data/raw/birds.dvc",
        "data/raw/birds/1.dvc",
        "data/raw/cat.png",
        "data/prepared/part/x",
        "data/more.dvc",
        "models/ema.safetensors",
        "README.md",
        "notes.txt",
    ):
        write_text(root / name, name)
    write_text(root / "dvc.lock", LOCK)
    return root


def test_it_holds_what_stages_read_and_neither_outputs_nor_raw_data(tmp_path: Path) -> None:
    assert collect(make(tmp_path)) == [
        "README.md",
        "config.toml",
        "data/more.dvc",
        "data/raw/.gitkeep",
        "data/raw/birds.dvc",
        "dvc.lock",
        "dvc.yaml",
        "expectations/images.json",
        "params.yaml",
        "src/darkroom/a.py",
        "tools/deep/t.sh",
    ]


def test_one_project_is_one_archive_wherever_and_whenever_it_lies(tmp_path: Path) -> None:
    first, second = make(tmp_path / "first"), make(tmp_path / "second")
    (second / "dvc.yaml").chmod(0o755)
    (second / "models/ema.safetensors").write_text("other weights")
    assert pack_project(first) == pack_project(second)
    (second / "params.yaml").write_text("another")
    assert pack_project(first) != pack_project(second)


def test_what_was_packed_is_unpacked() -> None:
    files = {"params.yaml": b"a: 1\n", "src/ä b.py": bytes(range(256)), "empty": b"", ".dvc/config": b"[core]\n"}
    assert unpack(pack(files)) == files
    assert unpack(pack({})) == {}


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "a/../../evil",
        "/etc/passwd",
        "a//b",
        "./a",
        "a\\..\\b",
        "C:/evil",
        ".git/hooks/post-checkout",
        "flows/.GIT/config",
        ".dvc/config.local",
        ".DVC/tmp/x",
        ".darkroom/mlflow.db",
        "directory/",
        "new\nline",
    ],
)
def test_a_name_that_no_project_has_is_refused(name: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("params.yaml", "a: 1")
        entry = zipfile.ZipInfo("placeholder")
        entry.filename = name
        archive.writestr(entry, "evil")
    with pytest.raises(StageFailed, match="which no project has"):
        unpack(buffer.getvalue())


def test_links_and_names_twice_are_refused() -> None:
    link = zipfile.ZipInfo("params.yaml")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(StageFailed, match="which no project has"):
        unpack(buffer.getvalue())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a", "2")
    with pytest.raises(StageFailed, match="which no project has"):
        unpack(buffer.getvalue())


def test_a_file_that_is_no_archive_or_was_cut_off_is_one_line() -> None:
    whole = pack({"params.yaml": b"a: 1\n"})
    for content in (b"", b"no archive", whole[:-5], whole.replace(b"a: 1", b"a: 2")):
        with pytest.raises(StageFailed, match="cannot be unpacked"):
            unpack(content)


def test_an_archive_that_grows_beyond_reason_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.registry.snapshot._MAX_TOTAL", 1 << 20)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("params.yaml", bytes(2 << 20))
    with pytest.raises(StageFailed, match="larger than"):
        unpack(buffer.getvalue())


def test_a_dependency_that_is_large_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("darkroom.registry.snapshot._MAX_FILE", 4)
    assert "config.toml" not in collect(make(tmp_path))
    assert "config.toml: larger than" in caplog.text
