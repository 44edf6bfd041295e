"""`darkroom data`: what may be accepted, what drift says, and that nothing else changes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from darkroom.cli import main
from darkroom.data.statistics import STATISTICS_FILE, DataStatistics, write_statistics
from darkroom.files import write_json
from darkroom.workspace import Workspace
from tests.integration.registry_project import make_project

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("drift")`: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(["data", *arguments])
        printed = capsys.readouterr()
        assert isinstance(done.value.code, int)
        return done.value.code, printed.out, printed.err

    return call


def prepare(
    workspace: Workspace, classes: dict[str, int], value: int = 100, image_size: int = 8, validated: bool = True
) -> str:
    """Write what prepare and validate leave, of images half black, half `value`; the digest."""
    images = sum(classes.values())
    half = images * image_size**2 // 2
    digest = f"{images:04x}{value:04x}{image_size:04x}{classes.get('ant', 0):04x}" + "0" * 48
    statistics = DataStatistics(
        name="pets",
        digest=digest,
        image_size=image_size,
        channels=1,
        classes=classes,
        images=images,
        sums=[half * value],
        squares=[half * value**2],
    )
    write_statistics(workspace.prepared / STATISTICS_FILE, statistics)
    info = {"name": "pets", "image_size": image_size, "channels": 1, "classes": list(classes), "digest": digest}
    write_json(workspace.prepared / "dataset.json", info | {"splits": {"train": images - 1, "test": 1}})
    if validated:
        write_json(workspace.reports / "validation.json", {"success": True, "dataset": digest})
    return digest


def accepted_file(workspace: Workspace) -> Path:
    return workspace.root / "expectations" / "accepted.json"


def test_accepting_records_the_data_set_and_whose_decision_it_was(workspace: Workspace, run: Run) -> None:
    digest = prepare(workspace, {"ant": 10, "bee": 10})
    code, out, err = run("accept", "--reason", " first delivery ")
    assert (code, err) == (0, "")
    assert out == f"pets {digest[:12]} is the accepted data set now; commit {accepted_file(workspace)}\n"
    written = json.loads(accepted_file(workspace).read_text())
    assert (written["digest"], written["reason"]) == (digest, "first delivery")
    assert written["who"]
    assert written["when"].endswith("+00:00")


def test_accepting_the_same_again_says_so_and_changes_nothing(workspace: Workspace, run: Run) -> None:
    prepare(workspace, {"ant": 10, "bee": 10})
    run("accept", "--reason", "first")
    before = accepted_file(workspace).read_bytes()
    code, out, _ = run("accept", "--reason", "second")
    assert code == 0
    assert "is the accepted data set already; accepted 2" in out
    assert out.endswith(": first\n")
    assert accepted_file(workspace).read_bytes() == before
    assert json.loads(run("accept", "--reason", "third", "--json")[1])["changed"] is False
    digest = prepare(workspace, {"ant": 12, "bee": 10})
    printed = json.loads(run("accept", "--reason", "more ants", "--json")[1])
    assert (printed["changed"], printed["digest"], printed["images"]) == (True, digest, 22)


def never_validated(workspace: Workspace) -> None:
    prepare(workspace, {"ant": 10}, validated=False)


def failed(workspace: Workspace) -> None:
    digest = prepare(workspace, {"ant": 10})
    write_json(workspace.reports / "validation.json", {"success": False, "dataset": digest})


def validated_before_it_changed(workspace: Workspace) -> None:
    prepare(workspace, {"ant": 10})
    prepare(workspace, {"ant": 12}, validated=False)


def garbled_report(workspace: Workspace) -> None:
    prepare(workspace, {"ant": 10})
    write_json(workspace.reports / "validation.json", [1])


def statistics_of_another(workspace: Workspace) -> None:
    prepare(workspace, {"ant": 10})
    other = (workspace.prepared / STATISTICS_FILE).read_bytes()
    prepare(workspace, {"ant": 12})
    (workspace.prepared / STATISTICS_FILE).write_bytes(other)


def garbled_baseline(workspace: Workspace) -> None:
    prepare(workspace, {"ant": 10})
    accepted_file(workspace).parent.mkdir(exist_ok=True)
    accepted_file(workspace).write_text("{}")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda workspace: None, "dataset.json: no such file; the prepare stage writes it"),
        (never_validated, "validation.json: no such file; only data that passed validation can be accepted"),
        (failed, "validation.json: the data set failed; only data that passed"),
        (validated_before_it_changed, "run `dvc repro validate`"),
        (garbled_report, "validation.json: cannot be read"),
        (statistics_of_another, "run the prepare stage again"),
        (garbled_baseline, "accepted.json: name: Field required"),
    ],
)
def test_data_that_did_not_pass_validation_cannot_be_accepted(
    workspace: Workspace, run: Run, state: Callable[[Workspace], None], words: str
) -> None:
    state(workspace)
    before = accepted_file(workspace).read_bytes() if accepted_file(workspace).exists() else None
    code, out, err = run("accept", "--reason", "because")
    assert (code, out) == (2, "")
    assert words in err
    assert (accepted_file(workspace).read_bytes() if accepted_file(workspace).exists() else None) == before


def test_accepting_needs_a_reason(workspace: Workspace, run: Run) -> None:
    prepare(workspace, {"ant": 10})
    assert run("accept", "--reason", " ")[2] == "darkroom: --reason: accepting a data set needs a reason\n"
    assert "--reason" in run("accept")[2]


def test_drift_within_the_thresholds_exits_with_0(workspace: Workspace, run: Run) -> None:
    prepare(workspace, {"ant": 10, "bee": 10})
    run("accept", "--reason", "first")
    prepare(workspace, {"ant": 11, "bee": 10})
    code, out, err = run("drift")
    assert (code, err) == (0, "")
    assert "  ant                                     50.00%      52.38%      +2.38%\n" in out
    assert "within, validate.max_class_drift = 0.1" in out
    assert "BEYOND" not in out


@pytest.mark.parametrize(
    ("classes", "changes", "words"),
    [
        (
            {"ant": 16, "bee": 4},
            {},
            ["class drift                               0.3000  BEYOND, validate.max_class_drift"],
        ),
        ({"ant": 10, "bee": 10}, {"value": 140}, ["channel drift                             0.4000  BEYOND"]),
        ({"ant": 10, "bee": 10}, {"image_size": 16}, ["not comparable: the accepted images are 1x8x8"]),
        ({"ant": 10, "cow": 10}, {}, ["1 new: cow", "1 vanished: bee", "0.5000  BEYOND"]),
    ],
)
def test_drift_beyond_a_threshold_exits_with_1(
    workspace: Workspace, run: Run, classes: dict[str, int], changes: dict[str, int], words: list[str]
) -> None:
    prepare(workspace, {"ant": 10, "bee": 10})
    run("accept", "--reason", "first")
    prepare(workspace, classes, **changes)
    code, out, err = run("drift")
    assert (code, err) == (1, "")
    for word in words:
        assert word in out
    code, out, _ = run("drift", "--json")
    printed = json.loads(out)
    assert (code, printed["within"], printed["accepted"]["reason"]) == (1, False, "first")
    assert printed["thresholds"] == {"max_class_drift": 0.1, "max_channel_drift": 0.1}


def test_largest_changes_come_first_and_ten_are_enough(workspace: Workspace, run: Run) -> None:
    names = [f"n{i:02d}" for i in range(30)]
    prepare(workspace, dict.fromkeys(names, 4))
    run("accept", "--reason", "first")
    prepare(workspace, dict.fromkeys(names, 4) | {"n17": 8})
    lines = run("drift")[1].splitlines()
    assert lines[2].startswith("  n17 ")
    assert lines[12] == "  and 20 that changed less"


def test_drift_without_a_baseline_or_data_says_what_to_do(workspace: Workspace, run: Run) -> None:
    code, out, err = run("drift")
    assert (code, out) == (2, "")
    assert "no accepted data set; `darkroom data accept` records one" in err
    digest = prepare(workspace, {"ant": 10})
    run("accept", "--reason", "first")
    assert digest[:12] in run("drift")[1]
    (workspace.prepared / STATISTICS_FILE).unlink()
    code, _, err = run("drift")
    assert code == 2
    assert "statistics.json: no such file; the prepare stage writes it" in err


def test_sync_tells_what_it_fetched(workspace: Workspace, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import darkroom.data.s3.sync

    synced = darkroom.data.s3.sync.Synced(
        uri="s3://b/p", path=workspace.raw, files=1200, bytes=3_400_000, new=2, changed=1, removed=0
    )
    monkeypatch.setattr(darkroom.data.s3.sync, "sync", lambda given: synced if given == workspace else None)
    code, out, _ = run("sync")
    assert code == 0
    assert out.splitlines() == [
        "s3://b/p: 1,200 files, 3.4 MB",
        "2 new, 1 changed, 0 removed",
        "data/raw has changed: `dvc repro` prepares it again",
    ]
    assert json.loads(run("sync", "--json")[1]) == {
        "uri": "s3://b/p",
        "files": 1200,
        "bytes": 3_400_000,
        "new": 2,
        "changed": 1,
        "removed": 0,
    }


def test_sync_of_a_source_that_is_not_on_s3_is_refused(workspace: Workspace, run: Run) -> None:
    code, _, err = run("sync")
    assert code == 2
    assert "nothing to sync; expected s3://bucket/prefix" in err
