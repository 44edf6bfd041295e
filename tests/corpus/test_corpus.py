"""Everything bad that the data may hold, and what becomes of it: nothing crashes, hangs, fills the disk, or trains.

`pytest -m corpus` lists the cases with their outcomes.
"""

import os
import re
from pathlib import Path

import pytest

from tests.corpus import archives, buckets, files
from tests.corpus.cases import Case, Project, run
from tests.s3 import empty_bucket, faulty, server, without_pauses

CASES = [*files.CASES, *archives.CASES, *buckets.CASES]
_lines: list[str] = []


@pytest.fixture(scope="module")
def endpoint():
    with server() as url:
        yield url


@pytest.fixture
def bucket(case, endpoint, monkeypatch):
    """For a case on S3: its bucket, behind a server with its fault; gone with the test."""
    if case not in buckets.CASES:
        yield
        return
    without_pauses(monkeypatch)
    with empty_bucket(endpoint, buckets.BUCKET, monkeypatch), faulty(endpoint) as proxy:
        proxy.fault = case.fault
        yield proxy


@pytest.mark.corpus
@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, tmp_path: Path, bucket, monkeypatch, caplog, report) -> None:
    project = Project(tmp_path)
    case.build(project)
    if bucket and "127.0.0.1:9" not in os.environ["AWS_ENDPOINT_URL"]:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.url)
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "darkroom")
    before = set(tmp_path.parent.iterdir())
    found, said = run(project, lambda: caplog.text)
    manifest = tmp_path / "data" / "prepared" / "manifest.parquet"
    line = next((text for text in said if re.search(case.says, text)), "")
    if found == "accepted":
        import pyarrow.parquet as pq

        paths = pq.read_table(manifest)["path"].to_pylist()
        line = next((path for path in paths if re.search(case.says, path)), "accepted")
    _lines.append(f"{case.name:<32}{found:<10}{_short(line, case.says)}")
    report("bad input", [f"{'case':<32}{'outcome':<10}what is said", *_lines, f"{len(_lines)} cases"])
    assert (found, bool(line)) == (case.outcome, True), "\n".join(said)
    assert set(tmp_path.parent.iterdir()) == before  # nothing was written outside
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_blocks * 512 for path in written) < 20_000_000


def test_there_are_enough_cases_and_no_two_of_a_name() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 30


def _short(line: str, says: str) -> str:
    """What matters of a line, from where it names the file or the expectation."""
    match = re.search(says, line)
    text = re.sub(r"(/[^\s:]*)?/data/raw/", "", line[match.start() :] if match else line)
    return text if len(text) <= 100 else text[:97] + "..."
