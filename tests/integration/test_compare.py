"""`darkroom compare` and `darkroom score` with a real registry."""

import json

import pytest

from darkroom.cli import main
from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import InputError
from darkroom.evaluation.rescore import score_model
from darkroom.files import write_json
from darkroom.registry.compare import compare
from darkroom.registry.promotion import register
from darkroom.registry.scoring import score
from darkroom.registry.screen import WIDTH, comparison_lines
from darkroom.workspace import Workspace
from tests.integration.registry_project import (
    empty_database,
    set_params,
    workspace,
    write_extractor,
    write_model,
    write_score,
)

__all__ = ["empty_database", "workspace"]  # fixtures

FIRST, SECOND = "models:/digits/1", "models:/digits/2"


def register_second(project: Workspace, fid: float, **protocol: object) -> None:
    write_model(project, 2)
    write_score(project, fid, **protocol)
    register(project)


def test_two_versions_side_by_side(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = workspace.root / "src/darkroom/train.py"
    code.parent.mkdir(parents=True)
    code.write_text("before\n")
    register(workspace)
    code.write_text("after\n")
    set_params(workspace, "train", batch_size=96)
    register_second(workspace, fid=0.9)
    found = compare(workspace, SECOND, FIRST)
    assert (found.mine.version, found.theirs.version) == ("2", "1")
    assert found.params == {"train.batch_size": (96, 64)}
    assert found.code == ["src/darkroom/train.py"]
    figures = {figure.name: figure for figure in found.figures}
    fid, kid = figures["unguided.fid"], figures["unguided.kid"]
    assert (fid.mine, fid.theirs, fid.beyond) == (0.9, 0.5, True)
    assert fid.difference == pytest.approx(0.4)
    assert (kid.difference, kid.beyond) == (0, False)
    assert figures["guided.near_copies"].beyond is None
    lines = comparison_lines(found)
    assert max(map(len, lines)) <= WIDTH
    assert [line for line in lines if line.lstrip().startswith("unguided FID") and line.endswith("beyond")]
    monkeypatch.chdir(workspace.root)
    with pytest.raises(SystemExit) as done:
        main(["compare", SECOND, FIRST, "--json"])
    assert done.value.code == 0
    told = {figure["name"]: figure for figure in json.loads(capsys.readouterr().out)["figures"]}
    assert told["unguided.fid"]["beyond"] is True


def test_without_a_common_protocol_the_fields_that_differ_are_named(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(workspace)
    register_second(workspace, fid=0.4, steps=4, num_images=30)
    monkeypatch.chdir(workspace.root)
    capsys.readouterr()  # what MLflow said while the models were registered
    with pytest.raises(SystemExit) as done:
        main(["compare", SECOND, FIRST])
    assert done.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "num_images: 30 here, 20 there; steps: 4 here, 3 there" in line
    assert "`darkroom score URI` measures a version under the current protocol" in line


def test_a_protocol_that_both_have_is_found_among_others(workspace: Workspace) -> None:
    common = write_score(workspace, fid=0.5, num_images=30)
    register(workspace)
    write_score(workspace, fid=0.1)
    register(workspace)
    register_second(workspace, fid=0.6, num_images=30)
    found = compare(workspace, FIRST, SECOND)
    assert found.protocol == common.protocol_digest
    assert {figure.name: figure.mine for figure in found.figures}["unguided.fid"] == 0.5


def test_the_champion_is_what_a_version_is_compared_with(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(workspace)
    monkeypatch.chdir(workspace.root)
    with pytest.raises(SystemExit) as done:
        main(["compare", FIRST])
    assert done.value.code == 2
    assert "has no @champion: there are @challenger" in capsys.readouterr().err


def test_a_version_that_was_scored_is_not_scored_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(workspace)
    monkeypatch.chdir(workspace.root)
    with pytest.raises(SystemExit) as done:
        main(["score", FIRST, "--json"])
    assert done.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["created"], told["version"]) == (False, "1")


def test_without_reports_there_is_no_protocol_to_score_under(workspace: Workspace) -> None:
    register(workspace)
    workspace.metrics_file.unlink()
    with pytest.raises(InputError, match=r"metrics\.json: no such file; `dvc repro` makes it"):
        score(workspace, FIRST)


def test_score_makes_two_versions_comparable(workspace: Workspace) -> None:
    write_extractor(workspace)
    params = workspace.params()
    model = DiffusionModel.load(workspace.models)
    write_json(
        workspace.metrics_file,
        score_model(model, workspace.extractor, params.sample, params.evaluate).to_json_dict(),
    )
    register(workspace)
    write_model(workspace, 2)
    write_score(workspace, num_images=30)
    register(workspace)
    with pytest.raises(InputError, match="different protocols"):
        compare(workspace, SECOND, FIRST)
    model = DiffusionModel.load(workspace.models)
    measured = score_model(model, workspace.extractor, params.sample, params.evaluate)
    write_json(workspace.metrics_file, measured.to_json_dict())
    scored = score(workspace, SECOND)
    assert (scored.created, scored.record) == (True, measured)
    assert not score(workspace, SECOND).created
    assert compare(workspace, SECOND, FIRST).protocol == measured.protocol_digest
