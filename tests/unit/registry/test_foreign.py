"""What a version may bring: each way to run code by a checkout alone, or to write or fetch elsewhere, is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from darkroom.errors import StageFailed
from darkroom.files import write_text
from darkroom.registry import dvc_outputs
from darkroom.registry.foreign import inspect, list_outputs
from darkroom.registry.snapshot import is_ordinary
from tests import forks

STAGE = {"cmd": "touch ran", "deps": ["src/darkroom/a.py"], "outs": ["data/prepared"]}
MD5 = "0123456789abcdef0123456789abcdef"


def version(**changed: Any) -> dict[str, bytes]:
    """The files of a small version; `stage` replaces keys of its stage, `lock` those of its outputs in the lock."""
    stage = STAGE | changed.pop("stage", {})
    lock = {"path": "data/prepared", "hash": "md5", "md5": f"{MD5}.dir"} | changed.pop("lock", {})
    deps = [{"path": path} for path in stage["deps"]]
    return {
        "dvc.yaml": yaml.safe_dump({"stages": {"one": stage}}).encode(),
        "dvc.lock": yaml.safe_dump(
            {"schema": "2.0", "stages": {"one": {"cmd": stage["cmd"], "deps": deps, "outs": [lock]}}}
        ).encode(),
        "params.yaml": b"place: data/prepared\nbad: ../..\n",
        "src/darkroom/a.py": b"a = 1\n",
        **{name: text.encode() for name, text in changed.get("files", {}).items()},
    }


@pytest.fixture(autouse=True)
def quick_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvc_outputs, "subprocess", forks)


def refused(root: Path, files: dict[str, bytes]) -> str:
    before = sorted(root.rglob("*"))
    with pytest.raises(StageFailed) as caught:
        inspect(root, files)
    assert sorted(root.rglob("*")) == before
    (line,) = str(caught.value).splitlines()
    assert len(line) < 400
    return line


@pytest.mark.parametrize(
    "name",
    [
        ".venv/lib/python3.11/site-packages/x.pth",
        "venv/lib/python3.11/site-packages/yaml/__init__.py",
        "tools/lib/dist-packages/x.py",
        "tools/pyvenv.cfg",
        "tools/sitecustomize.py",
        "tools/usercustomize/__init__.py",
        "tools/x.egg-info/entry_points.txt",
        "tools/x.dist-info/entry_points.txt",
        "tools/__pycache__/a.cpython-311.pyc",
        "tools/.hidden/a.py",
        "tools/.env",
        "tools/.gitattributes",
        "tools/dvc.yaml",
        "tools/dvc.lock",
        "tools/x.dvc",
        "src/sitecustomize.py",
        "src/orjson.py",
        "src/dvc_ssh/__init__.py",
        "SRC/orjson.py",
        "src/darkroom.egg-info/entry_points.txt",
        "src/darkroom/.git/config",
        ".envrc",
        ".gitattributes",
        ".gitmodules",
        ".github/workflows/x.yml",
        ".vscode/settings.json",
        ".pre-commit-config.yaml",
        ".git/hooks/post-checkout",
        ".dvc/plots/x.json",
        "conftest.py",
        "sitecustomize.py",
        "data/raw/a.py",
        "data/raw/.config",
        "flows/x.dvc",
    ],
)
def test_a_file_that_no_project_has_is_refused(tmp_path: Path, name: str) -> None:
    files = version(stage={"deps": ["src/darkroom/a.py", "tools", "src", "venv", ".venv"]}, files={name: "x"})
    assert repr(name)[1:-1] in refused(tmp_path, files)


def test_a_file_that_a_stage_depends_on_is_brought_except_over_a_python_environment(tmp_path: Path) -> None:
    files = version(
        stage={"deps": ["conftest.py", "env"]}, files={"conftest.py": "", "env/bin/dvc": "", "env/.gitkeep": ""}
    )
    assert set(inspect(tmp_path, files).files) == set(files)
    write_text(tmp_path / "env/pyvenv.cfg", "home = /usr/bin\n")
    assert "'env/bin/dvc', which no project has" in refused(tmp_path, files)


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "/tmp/outside",
        "a/../../outside",
        "${bad}/outside",
        ".venv/x.pth",
        ".git/hooks/pre-commit",
        ".dvc/config.local",
        "src/sitecustomize.py",
        "src",
        ".",
        "tools/dvc.yaml",
        "more.dvc",
    ],
)
def test_an_output_that_is_no_place_for_one_is_refused(tmp_path: Path, path: str) -> None:
    line = refused(tmp_path, version(stage={"outs": [path]}))
    assert "which is no place for an output" in line or "DVC cannot read" in line


def test_an_output_with_a_template_a_remote_and_a_metric_is_an_output(tmp_path: Path) -> None:
    outs = {"outs": ["${place}", {"models/a": {"remote": "far"}}], "metrics": ["reports/m.json"], "plots": ["p.csv"]}
    assert inspect(tmp_path, version(stage=outs)).places == []


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": {"wdir": "..", "outs": ["x"]}},
        {"stage": {"metrics": ["../m.json"]}},
        {"stage": {"plots": ["../p.csv"]}},
        {"stage": {"foreach": ["..", "."], "do": STAGE | {"outs": ["${item}/x"]}}},
        {"lock": {"md5": "ee/../../../../../outside"}},
        {"lock": {"md5": "../" + MD5}},
        {"lock": {"md5": None, "files": [{"relpath": "../../outside", "md5": MD5, "size": 1}]}},
        {"lock": {"md5": None, "files": [{"relpath": "inside", "md5": "ee/../../../x", "size": 1}]}},
        {"lock": {"md5": None, "files": [{"relpath": ".git/config", "md5": MD5, "size": 1}]}},
        {"files": {"x.dvc": "outs: [{path: x, md5: 'aa/../../x', hash: md5}]"}},
        {"files": {"data/x.dvc": "outs: [{path: ../../x, hash: md5}]"}},
        {"files": {"x.dvc": "wdir: ..\nouts: [{path: x, hash: md5}]"}},
        {"files": {"x.dvc": "outs: [{path: 's3://bucket/x'}]"}},
        {"files": {"x.dvc": "deps: [{path: a, repo: {url: 'ext::sh -c touch% ran'}}]\nouts: [{path: x}]"}},
        {"files": {"x.dvc": "deps: [{path: a, repo: {url: 'https://example.org/x.git'}}]\nouts: [{path: x}]"}},
        {"files": {"x.dvc": "db: {file_format: csv, connection: c, query: q}\ndeps: [{db: {}}]\nouts: [{path: x}]"}},
    ],
)
def test_a_pipeline_that_leads_elsewhere_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    if "foreach" in changes.get("stage", {}):
        files = version() | {"dvc.yaml": yaml.safe_dump({"stages": {"one": changes["stage"]}}).encode()}
    else:
        files = version(**changes)
    assert "version" in refused(tmp_path, files)


@pytest.mark.parametrize("name", ["dvc.yaml", "dvc.lock", "params.yaml", "data/raw/x.dvc"])
@pytest.mark.parametrize("text", ["a: " + "[" * 20_000, "x: &x [*x]", "a: " + "x" * (4 << 20), "a: \0", "\xff"])
def test_a_yaml_file_beyond_the_bounds_is_refused(tmp_path: Path, name: str, text: str) -> None:
    line = refused(tmp_path, version() | {name: text.encode("latin-1")})
    assert f"{name} cannot be read" in line or name == "dvc.lock"


@pytest.mark.parametrize(
    "lock", ["stages: 1", "stages: {a: 1}", "stages: {a: {deps: [1]}}", "stages: {a: {outs: 1}}", "[]"]
)
def test_a_lock_that_is_none_is_refused(tmp_path: Path, lock: str) -> None:
    assert refused(tmp_path, version() | {"dvc.lock": lock.encode()})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("['remote \"a\"']\nurl = s3://a\nconfigpath = tools/aws", "configpath"),
        ("['remote \"a\"']\nurl = s3://a\ncredentialpath = tools/aws", "credentialpath"),
        ("['remote \"a\"']\nurl = https://a\nbearer_token_command = touch ran", "bearer_token_command"),
        ("['remote \"a\"']\nurl = ssh://a\nkeyfile = x", "keyfile"),
        ("['remote \"a\"']\nurl = s3://a\nssl_verify = false", "ssl_verify"),
        ("['remote \"a\"']\nurl = s3://a\n  configpath = tools/aws", "url = 's3://a\\\\nconfigpath"),
        ("['remote \"a\"']\nurl = s3://a # shown", "s3://a # shown"),
        ("['remote \"a\"']\nurl = s3://%(x)s", "%"),
        ("['remote \"a\"']\nurl = remote://mine/x", "remote://"),
        ("['remote \"a\"']\nurl = ext::sh -c x", "ext::"),
        ("['remote \"a\"']\nurl = file:///etc", "file:"),
        ("['remote \"a\"']\nurl = ssh://-oProxyCommand=x/y", "-oProxyCommand"),
        ("['remote \"a\"']\nurl = ../../x", "../../x"),
        ("['remote \"a\"']\nurl = s3://a\nendpointurl = file:///x", "endpointurl"),
        ("['remote \"a]b\"']\nurl = s3://a", "remote"),
        ("[cache]\ndir = /etc", "cache"),
        ("[hydra]\nenabled = true", "hydra"),
        ('[db "x"]\nurl = x', "db"),
        ("url = s3://a", "cannot be read"),
    ],
)
def test_configuration_that_is_more_than_a_place_is_refused(tmp_path: Path, config: str, message: str) -> None:
    line = refused(tmp_path, version(files={".dvc/config": config}))
    assert ".dvc/config" in line
    assert message.replace("\\\\", "\\") in line


def test_a_remote_that_the_project_does_not_name_has_to_be_agreed_to(tmp_path: Path) -> None:
    files = version(
        stage={"deps": ["src/darkroom/a.py", "s3://bucket/raw"]},
        files={
            ".dvc/config": "[core]\nremote = b\nautostage = true\n"
            "['remote \"a\"']\nurl = s3://one\nprofile = team\n"
            "['remote \"b\"']\nurl = s3://one\nendpointurl = https://minio.example.org\n"
            "['remote \"mine\"']\nurl = https://example.org\n"
        },
    )
    offer = inspect(tmp_path, files)
    far = "s3://one,https://minio.example.org"
    assert offer.places == ["https://example.org", "s3://bucket/raw", "s3://one", far]
    assert offer.config["core"] == {"remote": "b"}
    assert offer.config['remote "a"'] == {"url": "s3://one"}
    assert set(offer.without({far})) == {'remote "a"', 'remote "mine"'}

    write_text(
        tmp_path / ".dvc/config.local", "['remote \"own\"']\nurl = s3://one\n['remote \"mine\"']\npassword = x\n"
    )
    offer = inspect(tmp_path, files)
    assert offer.places == ["s3://bucket/raw", far]
    assert set(offer.config) == {"core", 'remote "a"', 'remote "b"'}, "a name with a password gets no other URL"


def test_remotes_of_the_users_own_configuration_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "home/config", "['remote \"a\"']\nurl = s3://one\nsecret_access_key = x\n")
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "home"))
    files = version(files={".dvc/config": "['remote \"a\"']\nurl = s3://two\n['remote \"b\"']\nurl = s3://one\n"})
    offer = inspect(tmp_path, files)
    assert (offer.places, set(offer.config)) == ([], {'remote "b"'})


@pytest.mark.parametrize(
    ("name", "digest"),
    [("../../outside", MD5), ("a/../../x", MD5), ("", MD5), ("/x", MD5), (".git/config", MD5), ("x", "ee/../../../x")],
)
def test_a_listing_that_leads_elsewhere_is_refused(tmp_path: Path, name: str, digest: str) -> None:
    for file, content in version().items():
        write_text(tmp_path / file, content.decode())
    write_text(tmp_path / ".dvc/config", "[core]\nno_scm = true\n")
    listing = tmp_path / ".dvc/cache/files/md5" / MD5[:2] / f"{MD5[2:]}.dir"
    write_text(listing, json.dumps([{"md5": MD5, "relpath": "fine/.DS_Store"}]))
    assert list_outputs(tmp_path) == [{"path": "data/prepared", "files": [["fine/.DS_Store", MD5]], "error": None}]
    write_text(listing, json.dumps([{"md5": digest, "relpath": name}]))
    with pytest.raises(StageFailed, match="is none that DVC makes"):
        list_outputs(tmp_path)


def test_plain_paths_are_ordinary() -> None:
    assert all(is_ordinary(path) for path in ("src/darkroom/a.py", "models/raw.pth", "tools/ä b.sh", "x/.gitkeep", "M"))
    assert not any(is_ordinary(path) for path in ("", "a//b", "a\\b", "c:/x", "a\nb", "a\u202eb", "./a", "a/", "../a"))
