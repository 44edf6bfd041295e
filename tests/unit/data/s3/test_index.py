"""The index of what was fetched: the same bytes for the same data, and nothing lost to a kill."""

import json
from pathlib import Path

import pytest

from darkroom.data.s3.index import Index
from darkroom.data.s3.listing import Remote


def remote(i: int) -> Remote:
    return Remote(f"ä/{i}.png", f"set/ä/{i}.png", i, f"etag{i}")


def test_order_of_arrival_does_not_show(tmp_path: Path) -> None:
    for name, order in (("one", range(20)), ("two", reversed(range(20)))):
        index = Index(tmp_path / name)
        for i in order:
            index.add(remote(i), None)
        index.close()
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    found = json.loads((tmp_path / "one.json").read_text())
    assert list(found) == sorted(f"ä/{i}.png" for i in range(20))
    assert found["ä/7.png"] == {"etag": "etag7", "size": 7, "version": None}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]


def test_what_was_added_before_a_kill_is_known_after_it(tmp_path: Path) -> None:
    index = Index(tmp_path / "data")
    index.add(remote(1), "v1")
    index.close()
    killed = Index(tmp_path / "data")
    killed.add(remote(2), None)
    killed.add(remote(3), None)
    journal = tmp_path / ".data.journal"
    journal.write_bytes(journal.read_bytes()[:-4])
    after = Index(tmp_path / "data")
    assert [after.has(remote(i)) for i in range(5)] == [False, True, True, False, False]
    after.add(remote(4), None)  # behind the line that was cut short
    assert [Index(tmp_path / "data").has(remote(i)) for i in range(5)] == [False, True, True, False, True]
    after.close()
    assert [Index(tmp_path / "data").has(remote(i)) for i in range(5)] == [False, True, True, False, True]
    assert not journal.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"a.png": [1, "etag"]}', '{"a.png": null}'])
def test_index_of_another_form_is_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content)
    index = Index(tmp_path / "data")
    assert index.entries == {}
    index.close()
    assert json.loads((tmp_path / "data.json").read_text()) == {}


def test_another_size_or_etag_is_another_content(tmp_path: Path) -> None:
    index = Index(tmp_path / "data")
    index.add(Remote("a.png", "a.png", 3, "x"), None)
    assert index.has(Remote("a.png", "a.png", 3, "x"))
    assert not index.has(Remote("a.png", "a.png", 4, "x"))
    assert not index.has(Remote("a.png", "a.png", 3, "y"))
