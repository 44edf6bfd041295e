import fcntl
import hashlib
import os

import pytest

from darkroom.files import digest_file, digest_json, digest_tree, replacing, write_json


def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": 2})

    def fail_half_way():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail_half_way()
    assert path.read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_written_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"fid": float("nan")})
    assert not list(tmp_path.iterdir())


def test_digests_are_sha256_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert digest_file(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert digest_json({"b": 1, "a": [1, 2]}) == hashlib.sha256(b'{"a":[1,2],"b":1}').hexdigest()


def test_tree_digest_changes_with_a_name_and_with_a_byte(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.py").write_text("1")
    first = digest_tree(tmp_path, [tmp_path / "p"])
    (tmp_path / "p" / "a.py").write_text("2")
    second = digest_tree(tmp_path, [tmp_path / "p"])
    (tmp_path / "p" / "a.py").rename(tmp_path / "p" / "b.py")
    third = digest_tree(tmp_path, [tmp_path / "p"])
    assert len({first, second, third}) == 3


def test_what_a_killed_process_left_of_a_file_is_removed_by_the_next_that_writes_it(tmp_path):
    left, in_use = tmp_path / ".a.json.left.tmp", tmp_path / ".a.json.used.tmp"
    others = tmp_path / ".b.json.left.tmp"
    for path in (left, in_use, others):
        path.touch()
    with in_use.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_json(tmp_path / "a.json", {})
        with replacing(tmp_path / "a.json") as first, replacing(tmp_path / "a.json") as second:
            assert first.exists()
            second.write_text("{}")
            first.write_text("[]")
    assert sorted(path.name for path in tmp_path.iterdir()) == [in_use.name, others.name, "a.json"]
    assert (tmp_path / "a.json").read_text() == "[]"
