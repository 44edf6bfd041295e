"""What of DVC's configuration others get to see: where the remotes are, and no secret."""

from pathlib import Path

import pytest

from darkroom.errors import InputError
from darkroom.files import write_text
from darkroom.registry.dvc_config import amend, parse_config, portable_config, read_config, write_config

SHARED = """\
[core]
    remote = shared
    analytics = false
    no_scm = True
    site_cache_dir = /var/somewhere
[cache]
    dir = /mnt/cache
['remote "shared"']
    url = s3://bucket/cache
    region = eu-central-1
    profile = team
    access_key_id = KEY
    secret_access_key = SECRET
    version_aware = true
"""
LOCAL = """\
[core]
    remote = mine
['remote "mine"']
    url = https://user:SECRET@storage.example.org/models?token=SECRET
    password = SECRET
    profile = private
['remote "shared"']
    endpointurl = http://user:SECRET@minio.example.org:9000
    secret_access_key = SECRET
['remote "disk"']
    url = ../../disk
"""


def test_places_are_kept_and_secrets_are_not(tmp_path: Path) -> None:
    write_text(tmp_path / "a/b/.dvc/config", SHARED)
    write_text(tmp_path / "a/b/.dvc/config.local", LOCAL)
    found = portable_config(tmp_path / "a/b")
    assert found == {
        "core": {"remote": "shared", "analytics": "false"},
        'remote "disk"': {"url": str(tmp_path / "a/disk")},
        'remote "mine"': {"url": "https://user@storage.example.org/models"},
        'remote "shared"': {
            "url": "s3://bucket/cache",
            "region": "eu-central-1",
            "version_aware": "true",
            "endpointurl": "http://user@minio.example.org:9000",
        },
    }
    text = write_config(found)
    assert "SECRET" not in text
    assert "KEY" not in text
    assert parse_config(text) == found


def test_the_remote_of_this_machine_alone_becomes_the_default(tmp_path: Path) -> None:
    write_text(tmp_path / ".dvc/config.local", LOCAL)
    assert portable_config(tmp_path)["core"] == {"remote": "mine"}


def test_without_dvc_there_is_nothing(tmp_path: Path) -> None:
    assert portable_config(tmp_path) == {}


def test_what_dvc_itself_writes_is_read_and_what_is_written_dvc_reads(tmp_path: Path) -> None:
    from dvc.config import Config

    write_text(tmp_path / ".dvc/config", write_config(parse_config(SHARED)))
    (tmp_path / ".dvc/tmp").mkdir()
    assert Config(str(tmp_path / ".dvc"))["remote"]["shared"]["url"] == "s3://bucket/cache"


def test_a_garbled_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("url = nowhere\n")
    with pytest.raises(InputError, match="config: cannot be read"):
        read_config(tmp_path / "config")


def test_what_is_added_leaves_comments_and_secrets_as_they_are() -> None:
    text = "# of this machine\n[core]\n    analytics = false\n['remote \"mine\"']\n    password = SECRET\n"
    amended = amend(text, {"core": {"remote": "new"}, 'remote "new"': {"url": "s3://bucket"}})
    assert set(text.splitlines()) < set(amended.splitlines())
    assert parse_config(amended) == {
        "core": {"remote": "new", "analytics": "false"},
        'remote "mine"': {"password": "SECRET"},
        'remote "new"': {"url": "s3://bucket"},
    }
    assert amend(text, {}) == text
