"""A full disk, or a file that may not grow, is known whatever library meets it: each meets it for real."""

import errno
import os
import resource
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sqlalchemy import create_engine, text

from darkroom.disk import database_problem, disk_error, sentence
from darkroom.files import replacing, replacing_directory

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")

WRITERS = {
    "python": lambda path: path.write_bytes(bytes(100)),
    "numpy": lambda path: np.save(path.open("wb", buffering=0), np.zeros(10_000)),
    "parquet": lambda path: pq.write_table(pa.table({"x": range(10_000)}), path),
    "pillow": lambda path: Image.new("RGB", (64, 64)).save(path, "PNG"),
}


@pytest.fixture
def full(tmp_path):
    """A link: some libraries remove the file that they could not write."""
    (tmp_path / "full").symlink_to("/dev/full")
    return tmp_path / "full"


@needs_full
@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_is_told_from_what_each_library_raises(library, full):
    with pytest.raises(Exception) as raised:  # noqa: PT011 (each has one of its own)
        WRITERS[library](full)
    found = disk_error(raised.value)
    assert found is not None
    assert (found.errno, found.strerror) == (errno.ENOSPC, "No space left on device")
    assert "\n" not in sentence(found)


def limited(write, path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("library", [*WRITERS, "safetensors"])
@pytest.mark.parametrize("make", [replacing, replacing_directory])
def test_so_is_a_file_that_may_not_grow_and_it_is_named_and_nothing_is_left(library, make, tmp_path):
    write = WRITERS.get(library) or (lambda path: save_file({"x": torch.ones(10_000)}, path))
    with pytest.raises(OSError, match=r"No space left|File too large") as raised, make(tmp_path / "out") as path:
        limited(write, path / "inner" if path.is_dir() else path)
    assert raised.value.filename == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@needs_full
@pytest.mark.parametrize("library", WRITERS)
@pytest.mark.parametrize("make", [replacing, replacing_directory])
def test_the_file_that_was_to_be_written_is_named_and_nothing_is_left(library, make, tmp_path, full):
    with pytest.raises(OSError, match="No space left") as raised, make(tmp_path / "out"):
        WRITERS[library](full)
    assert raised.value.filename in (str(tmp_path / "out"), str(full))
    assert [path for path in tmp_path.iterdir() if path != full] == []


def query(file, *statements):
    """What SQLAlchemy raises, as the cause of another error, as MLflow does it."""
    try:
        with create_engine(f"sqlite:///{file}").connect() as connection:
            for statement in statements:
                connection.execute(text(statement))
    except Exception as error:
        raise RuntimeError("a library") from error


def table(file):
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE x (y)")
        database.executemany("INSERT INTO x VALUES (?)", [(bytes(2000),)] * 50)


@pytest.mark.parametrize(
    ("offset", "said"), [(0, "file is not a database"), (8192, "database disk image is malformed")]
)
def test_a_damaged_database_is_named_with_what_to_do(tmp_path, offset, said):
    file = tmp_path / "mlflow.db"
    table(file)
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(os.urandom(8192))
    with pytest.raises(RuntimeError) as raised:
        query(file, "SELECT sum(length(y)) FROM x")
    problem = database_problem(raised.value, str(file))
    assert problem is not None
    assert problem.startswith(f"the database {file} is damaged ({said}): put a backup in its place")


def test_a_database_without_room_is_named(tmp_path):
    file = tmp_path / "mlflow.db"
    table(file)
    with pytest.raises(RuntimeError) as raised:
        query(file, "PRAGMA max_page_count = 1", "INSERT INTO x SELECT y FROM x")
    assert database_problem(raised.value, "mlflow.db").startswith(
        "the database mlflow.db cannot be written or read: database or disk is full"
    )


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        OSError(errno.ECONNREFUSED, "Connection refused"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        sqlite3.OperationalError("no such table: x"),
    ],
)
def test_what_is_no_matter_of_the_disk_stays_what_it_is(error):
    assert disk_error(error) is None
    assert database_problem(error, "mlflow.db") is None


def test_a_defect_that_is_met_while_a_full_disk_is_handled_stays_one(tmp_path):
    def clean_up(path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        except OSError:
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError) as raised, replacing(tmp_path / "out") as path:
        clean_up(path)
    assert disk_error(raised.value) is None
